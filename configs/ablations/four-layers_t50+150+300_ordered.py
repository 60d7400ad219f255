_base_ = './_base_.py'

model = dict(neck=dict(type='OrderedAggregationNeck'))

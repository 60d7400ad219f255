_base_ = './twelve-layers_inversion3_agg.py'

model = dict(neck=dict(type='OrderedAggregationNeck'))

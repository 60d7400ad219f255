_base_ = './twelve-layers_inversion11_agg.py'

model = dict(neck=dict(type='OrderedAggregationNeck'))

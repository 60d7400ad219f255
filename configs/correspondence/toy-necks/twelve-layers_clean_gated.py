_base_ = './twelve-layers_clean_agg.py'

model = dict(neck=dict(type='GatedAggregationNeck'))

_base_ = './twelve-layers_t50_agg.py'

layer = 'up-level3-repeat2-res-increment'
model = dict(backbone=dict(layers=[layer], channels=[48]), neck=dict(levels=[[48]], layer_names=[[layer]]))

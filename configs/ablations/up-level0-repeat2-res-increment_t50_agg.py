_base_ = './twelve-layers_t50_agg.py'

layer = 'up-level0-repeat2-res-increment'
model = dict(backbone=dict(layers=[layer], channels=[96]), neck=dict(levels=[[96]], layer_names=[[layer]]))

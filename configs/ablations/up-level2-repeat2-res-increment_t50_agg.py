_base_ = './twelve-layers_t50_agg.py'

layer = 'up-level2-repeat2-res-increment'
model = dict(backbone=dict(layers=[layer], channels=[64]), neck=dict(levels=[[64]], layer_names=[[layer]]))

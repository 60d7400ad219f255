_base_ = './single-layer_t50_zero-shot.py'

model = dict(backbone=dict(random=['unet']))

_base_ = './best-layer_t50.py'

model = dict(backbone=dict(random=['unet']))

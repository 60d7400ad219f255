_base_ = './best-layer_t0.py'

model = dict(backbone=dict(random=['unet']))

_base_ = './dift-2_t0.py'

model = dict(backbone=dict(random=['unet']))

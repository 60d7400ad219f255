_base_ = './masks.py'

model = dict(backbone=dict(random=['unet']))

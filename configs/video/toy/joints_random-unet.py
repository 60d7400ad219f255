_base_ = './joints.py'

model = dict(backbone=dict(random=['unet']))

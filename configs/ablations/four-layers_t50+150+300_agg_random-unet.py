_base_ = './_base_.py'

model = dict(backbone=dict(random=['unet']))

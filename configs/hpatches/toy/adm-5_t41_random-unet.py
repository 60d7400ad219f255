_base_ = './adm-5_t41.py'

model = dict(backbone=dict(random=['unet']))

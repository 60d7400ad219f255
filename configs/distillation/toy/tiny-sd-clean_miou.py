# one pass without noise, not distilled
_base_ = './_miou.py'

model = dict(backbone=dict(trajectory='clean', vae_sample='mode'))

# one pass without noise, not distilled
_base_ = './_pck.py'

model = dict(backbone=dict(trajectory='clean', vae_sample='mode'))

# the mean of eight draws of noise
_base_ = './_miou.py'

model = dict(backbone=dict(ensemble=8))

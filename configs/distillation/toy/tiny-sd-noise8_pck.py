# the mean of eight draws of noise
_base_ = './_pck.py'

model = dict(backbone=dict(ensemble=8))

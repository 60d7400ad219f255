# one draw of noise
_base_ = './_miou.py'

model = dict(backbone=dict(timesteps=[50]))

# one draw of noise
_base_ = './_pck.py'

model = dict(backbone=dict(timesteps=[50]))

# the mean of eight draws of noise
_base_ = './_pck.py'

model = dict(backbone=dict(timesteps=[50], ensemble=8))

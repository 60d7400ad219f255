# one pass without noise, at the timestep with which the student begins
_base_ = './tiny-sd-clean_pck.py'

model = dict(backbone=dict(timesteps=[150]))

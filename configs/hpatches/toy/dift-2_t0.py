# the layer and the timestep of DIFT_sd
_base_ = './_base_.py'

model = dict(backbone=dict(layers=['up-level2-upsampler-out'], channels=[64], timesteps=[0]))

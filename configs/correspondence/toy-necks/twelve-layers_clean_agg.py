# one step: the UNet is called once, on the latent without noise
_base_ = './_base_.py'

timesteps = [-1]
model = dict(backbone=dict(timesteps=timesteps, trajectory='clean'), neck=dict(timestep_names=timesteps))

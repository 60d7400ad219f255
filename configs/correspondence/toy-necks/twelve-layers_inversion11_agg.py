# eleven steps of DDIM inversion, of twelve where Diffusion Hyperfeatures has fifty
_base_ = './_base_.py'

timesteps = [-1, *range(83, 900, 83)]
model = dict(
    backbone=dict(timesteps=timesteps, trajectory=dict(type='inversion', steps=12)),
    neck=dict(timesteps=len(timesteps), timestep_names=timesteps),
)

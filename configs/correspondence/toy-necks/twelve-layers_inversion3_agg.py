# three of the eleven steps of inversion
_base_ = './_base_.py'

timesteps = [-1, 166, 332]
model = dict(
    backbone=dict(timesteps=timesteps, trajectory=dict(type='inversion', steps=12)),
    neck=dict(timesteps=len(timesteps), timestep_names=timesteps),
)

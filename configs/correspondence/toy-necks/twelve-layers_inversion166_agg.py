# one of the eleven steps of inversion, the one that matches best alone
_base_ = './_base_.py'

timesteps = [166]
model = dict(
    backbone=dict(timesteps=timesteps, trajectory=dict(type='inversion', steps=12)),
    neck=dict(timestep_names=timesteps),
)

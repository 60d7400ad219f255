# one-step Diffusion Hyperfeatures: the UNet is called once, on the latent without noise
_base_ = './correspondence_dhf.py'

timesteps = [-1]
model = dict(
    backbone=dict(timesteps=timesteps, trajectory='clean'),
    neck=dict(timesteps=1, timestep_names=timesteps),
)

_base_ = './_base_.py'

timesteps = [50]
model = dict(backbone=dict(timesteps=timesteps), neck=dict(timesteps=1, timestep_names=timesteps))

# noise instead of inversion at the same timesteps; 0, where there is hardly any, stands for the clean latent
_base_ = './_agg.py'

timesteps = [0, *range(83, 900, 83)]
model = dict(backbone=dict(timesteps=timesteps), neck=dict(timesteps=len(timesteps), timestep_names=timesteps))

# the second convolutions of all residual blocks on the way up, which Diffusion Hyperfeatures aggregates
_base_ = './_base_.py'

layers = {
    f'up-level{level}-repeat{repeat}-res-increment': channels
    for level, channels in enumerate([96, 96, 64, 48])
    for repeat in range(3)
}
timesteps = [50]
model = dict(
    backbone=dict(layers=list(layers), channels=list(layers.values()), timesteps=timesteps),
    neck=dict(levels=[list(layers.values())], layer_names=[list(layers)], timesteps=1, timestep_names=timesteps),
)

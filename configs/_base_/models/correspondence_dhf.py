# Diffusion Hyperfeatures (arXiv 2305.14334): the second convolution of each residual block of the decoder, at eleven of
# the fifty steps of DDIM inversion
_base_ = './correspondence_agg.py'

layers = {
    f'up-level{level}-repeat{repeat}-res-increment': channels
    for level, channels in enumerate([1280, 1280, 640, 320])
    for repeat in range(3)
}
timesteps = [-1, *range(60, 1000, 100)]  # from clean to noisy
model = dict(
    backbone=dict(
        model='sd15',
        layers=list(layers),
        channels=list(layers.values()),
        timesteps=timesteps,
        trajectory='inversion',
    ),
    neck=dict(
        levels=[list(layers.values())],
        timesteps=len(timesteps),
        output_sizes=[64],
        layer_names=[list(layers)],
        timestep_names=timesteps,
    ),
)

# the activations that Generic Diffusion Feature recommends for SD 1.5
_base_ = './_upernet.py'

levels = [
    {'up-level3-repeat0-vit-block0-self-k': 48},  # stride 4
    {'up-level2-repeat1-vit-block0-cross-q': 64},  # stride 8
    {'up-level1-repeat1-vit-block0-cross-q': 96, 'up-level1-repeat2-res-out': 96},  # stride 16
]
timesteps = [50]
width = 128
model = dict(
    backbone=dict(
        layers=[name for level in levels for name in level],
        channels=[channels for level in levels for channels in level.values()],
        timesteps=timesteps,
    ),
    neck=dict(
        levels=[list(level.values()) for level in levels],
        out_channels=width,
        layer_names=[list(level) for level in levels],
        timesteps=1,
        timestep_names=timesteps,
    ),
    decode_head=dict(in_channels=[width] * len(levels)),
    auxiliary_head=dict(in_channels=width),
)

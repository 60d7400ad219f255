# the activations that Generic Diffusion Feature recommends for Stable Diffusion 1.5 (config_15_practical)
_base_ = './diffusion_upernet.py'

levels = [
    {'up-level3-repeat0-vit-block0-self-k': 320},  # stride 8
    {'up-level2-repeat1-vit-block0-cross-q': 640},  # stride 16
    {'up-level1-repeat1-vit-block0-cross-q': 1280, 'up-level1-repeat2-res-out': 1280},  # stride 32
]
timesteps = [50]
model = dict(
    backbone=dict(
        model='sd15',
        layers=[name for level in levels for name in level],
        channels=[channels for level in levels for channels in level.values()],
        timesteps=timesteps,
    ),
    neck=dict(
        levels=[list(level.values()) for level in levels],
        timesteps=len(timesteps),
        layer_names=[list(level) for level in levels],
        timestep_names=timesteps,
    ),
    decode_head=dict(in_channels=[512, 512, 512], in_index=[0, 1, 2]),
)

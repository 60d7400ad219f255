# the activations that Generic Diffusion Feature recommends for Stable Diffusion XL (config_xl_practical)
_base_ = './diffusion_upernet.py'

levels = [
    {'up-level1-repeat0-vit-block0-cross-q': 640, 'up-level1-repeat0-vit-block0-out': 640},  # stride 16
    {'up-level0-repeat0-vit-block5-out': 1280, 'up-level0-repeat0-vit-block7-out': 1280},  # stride 32
]
timesteps = [50]
model = dict(
    backbone=dict(
        model='sdxl',
        layers=[name for level in levels for name in level],
        channels=[channels for level in levels for channels in level.values()],
        timesteps=timesteps,
        input_size=1024,
    ),
    neck=dict(
        levels=[list(level.values()) for level in levels],
        timesteps=len(timesteps),
        layer_names=[list(level) for level in levels],
        timestep_names=timesteps,
    ),
    decode_head=dict(in_channels=[512, 512], in_index=[0, 1]),
)

# outputs of the blocks of Stable Diffusion XL, as used before Generic Diffusion Feature (its config_xl_legacy)
_base_ = './diffusion_upernet.py'

levels = [
    {'up-level1-upsampler-out': 640, 'up-level2-repeat2-res-out': 320},  # stride 8
    {'up-level0-upsampler-out': 1280},  # stride 16
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

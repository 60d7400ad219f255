# outputs of the blocks of Stable Diffusion 1.5, as used before Generic Diffusion Feature (its config_15_legacy)
_base_ = './diffusion_upernet.py'

levels = [
    {'up-level2-upsampler-out': 640, 'up-level3-repeat2-vit-out': 320},  # stride 8
    {'up-level1-upsampler-out': 1280},  # stride 16
    {'up-level0-upsampler-out': 1280},  # stride 32
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

# SDXL and Playground v2 together: Ours-XL-t of Generic Diffusion Feature for segmentation (its "alternative" set)
_base_ = './diffusion_upernet.py'

sdxl = [
    {'up-level1-upsampler-out': 640},  # stride 8
    {'up-level1-repeat0-vit-block0-cross-q': 640, 'up-level1-repeat0-vit-block0-out': 640},  # stride 16
    {'up-level0-repeat0-vit-block5-out': 1280, 'up-level0-repeat0-vit-block7-out': 1280},  # stride 32
]
playground = [
    {'up-level1-upsampler-out': 640},  # stride 8
    {'up-level1-repeat0-vit-block0-cross-q': 640},  # stride 16
    {'up-level0-repeat0-vit-block5-out': 1280},  # stride 32
]
timesteps = [50]
backbones = [
    dict(
        type='DiffusionBackbone',
        model=name,
        layers=[layer for level in levels for layer in level],
        channels=[channels for level in levels for channels in level.values()],
        levels=[len(level) for level in levels],
        timesteps=timesteps,
        input_size=1024,
    )
    for name, levels in (('sdxl', sdxl), ('playground-v2', playground))
]
pairs = list(zip(sdxl, playground, strict=True))
model = dict(
    backbone=dict(
        _delete_=True,
        type='EnsembleBackbone',
        backbones=backbones,
        offload='sequential',  # one network on the device at a time, for 24 GB; None is faster where both fit
    ),
    neck=dict(
        levels=[[*a.values(), *b.values()] for a, b in pairs],
        timesteps=len(timesteps),
        layer_names=[[*(f'sdxl {name}' for name in a), *(f'playground {name}' for name in b)] for a, b in pairs],
        timestep_names=timesteps,
    ),
    decode_head=dict(in_channels=[512, 512, 512], in_index=[0, 1, 2]),
)

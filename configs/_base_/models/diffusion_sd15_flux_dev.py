# Stable Diffusion 1.5 and FLUX.1-dev together: Flux sees 1024 x 1024 pixels, and its maps join the level of stride 8
_base_ = './diffusion_upernet.py'

sd15 = [
    {'up-level3-repeat0-vit-block0-self-k': 320},  # stride 8
    {'up-level2-repeat1-vit-block0-cross-q': 640},  # stride 16
    {'up-level1-repeat1-vit-block0-cross-q': 1280, 'up-level1-repeat2-res-out': 1280},  # stride 32
]
flux = [{'vit-block24-mod': 3072, 'vit-block28-mod': 3072}, {}, {}]
backbones = [
    dict(
        type='DiffusionBackbone',
        model='sd15',
        layers=[layer for level in sd15 for layer in level],
        channels=[channels for level in sd15 for channels in level.values()],
        levels=[len(level) for level in sd15],
        timesteps=[50],
    ),
    dict(
        type='DiffusionBackbone',
        model='flux-dev',
        layers=[layer for level in flux for layer in level],
        channels=[channels for level in flux for channels in level.values()],
        levels=[len(level) for level in flux],
        timesteps=[260],  # sigma 0.26
        input_size=1024,
        dtype='bfloat16',
    ),
]
pairs = list(zip(sd15, flux, strict=True))
model = dict(
    backbone=dict(_delete_=True, type='EnsembleBackbone', backbones=backbones, offload='sequential'),
    neck=dict(
        levels=[[*a.values(), *b.values()] for a, b in pairs],
        timesteps=1,
        layer_names=[[*(f'sd15 {name}@50' for name in a), *(f'flux-dev {name}@260' for name in b)] for a, b in pairs],
        timestep_names=['own'],
    ),
    decode_head=dict(in_channels=[512, 512, 512], in_index=[0, 1, 2]),
)

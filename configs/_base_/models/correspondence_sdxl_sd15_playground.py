# SDXL, SD 1.5 with its cross-attention, and Playground v2 together: Ours-XL-t of Generic Diffusion Feature (its
# config_xl_practical, config_15_amalgamation with attention up_cross, and config_pg_amalgamation)
_base_ = './correspondence_agg.py'

sdxl = {
    'up-level0-repeat0-vit-block5-out': 1280,  # stride 32
    'up-level0-repeat0-vit-block7-out': 1280,  # stride 32
    'up-level1-repeat0-vit-block0-cross-q': 640,  # stride 16
    'up-level1-repeat0-vit-block0-out': 640,  # stride 16
}
sd15 = {
    'up-level1-repeat1-vit-block0-cross-q': 1280,  # stride 32
    'up-level2-repeat1-vit-block0-cross-q': 640,  # stride 16
    'up-level2-upsampler-out': 640,  # stride 8
    'up-level3-repeat0-vit-block0-self-k': 320,  # stride 8
    'attn': 154,  # stride 8: the 77 tokens of the prompt at two sizes
}
playground = {'up-level0-repeat0-vit-block3-out': 1280}  # stride 32
timesteps = [50]
members = {'sdxl': (sdxl, 1024), 'sd15': (sd15, 512), 'playground-v2': (playground, 1024)}  # and image sizes
backbones = [
    dict(
        type='DiffusionBackbone',
        model=name,
        layers=[layer for layer in layers if layer != 'attn'],
        channels=list(layers.values()),
        attention_maps=['up_cross'] if 'attn' in layers else [],
        truncate_prompts=True,  # to 77 tokens, the channels of attention
        timesteps=timesteps,
        input_size=size,  # of pictures that come in their own sizes
        interpolation='bicubic',
    )
    for name, (layers, size) in members.items()
]
channels = [*sdxl.values(), *sd15.values(), *playground.values()]
names = [f'{name} {layer}' for name, (layers, _) in members.items() for layer in layers]
model = dict(
    backbone=dict(
        _delete_=True,
        type='EnsembleBackbone',
        backbones=backbones,
        offload='sequential',  # one network on the device at a time, for 24 GB; None is faster where all fit
    ),
    neck=dict(levels=[channels], timesteps=len(timesteps), layer_names=[names], timestep_names=timesteps),
    prompt='a photo of a {category}',
)

# Ours-XL-t of Generic Diffusion Feature for Horse-21: its config_xl_practical, config_15_amalgamation with attention
# up_cross, and config_pg_amalgamation
_base_ = './sdxl-t50_pixel-classifier_1xb64-100e_horse-21-1024x1024.py'

sdxl = dict(zip(_base_.model.backbone.layers, _base_.model.backbone.channels, strict=True))
sd15 = {
    'up-level3-repeat0-vit-block0-self-k': 320,  # stride 8
    'up-level2-upsampler-out': 640,  # stride 8
    'up-level2-repeat1-vit-block0-cross-q': 640,  # stride 16
    'up-level1-repeat1-vit-block0-cross-q': 1280,  # stride 32
    'attn': 154,  # stride 8: the 77 tokens of the prompt at two sizes
}
playground = {'up-level0-repeat0-vit-block3-out': 1280}  # stride 32
backbones = [
    dict(
        type='DiffusionBackbone',
        model=name,
        layers=[layer for layer in layers if layer != 'attn'],
        channels=list(layers.values()),
        timesteps=[timestep],
        input_size=size,  # of pictures that come in their own sizes
        interpolation='bicubic',
        prompt=_base_.model.backbone.prompt,
        attention_maps=['up_cross'] if 'attn' in layers else [],
    )
    for name, layers, timestep, size in (
        ('sdxl', sdxl, 50, 1024),
        ('sd15', sd15, 51, 512),  # where t=50 leads in the PNDM schedule of diffusers, with its steps_offset of 1
        ('playground-v2', playground, 50, 1024),
    )
]
model = dict(
    backbone=dict(_delete_=True, type='EnsembleBackbone', backbones=backbones, offload='sequential'),
    decode_head=dict(in_channels=[*sdxl.values(), *sd15.values(), *playground.values()]),
)
train_pipeline = [_base_.load, *_base_.train_pipeline[2:]]  # without `Resize`
test_pipeline = [_base_.load, *_base_.test_pipeline[2:]]
tta_pipeline = [_base_.load, dict(type='TestTimeAug', transforms=_base_.tta_pipeline[1].transforms[1:])]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))

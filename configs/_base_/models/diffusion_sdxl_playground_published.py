# as the code of Generic Diffusion Feature trains on these activations, see ../../segmentation/README.md
_base_ = './diffusion_sdxl_playground.py'

sdxl, playground = _base_.sdxl[::-1], _base_.playground[::-1]  # coarse -> fine
timesteps = [50]
backbones = [
    dict(
        member,
        layers=[layer for level in levels for layer in level],
        channels=[channels for level in levels for channels in level.values()],
        levels=[len(level) for level in levels],
        timesteps=timesteps,
        noise='random',
        dtype='float16',
        memory_format='contiguous',
    )
    for member, levels in zip(_base_.backbones, (sdxl, playground), strict=True)
]
channels = [[*a.values(), *b.values()] for a, b in zip(sdxl, playground, strict=True)]
model = dict(
    data_preprocessor=dict(seg_pad_val=1),
    backbone=dict(backbones=backbones),
    neck=dict(_delete_=True, type='ConcatNeck', levels=channels, order='coarse-to-fine'),
    decode_head=dict(in_channels=[sum(level) for level in channels], pool_scales=(1, 2, 3)),
    auxiliary_head=dict(in_channels=sum(channels[1]), channels=512),
)

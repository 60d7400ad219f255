# as the code of Generic Diffusion Feature trains on these activations, see ../../segmentation/README.md
_base_ = './diffusion_sdxl_legacy.py'

levels = _base_.levels[::-1]  # coarse -> fine
channels = [list(level.values()) for level in levels]
timesteps = [50]
model = dict(
    data_preprocessor=dict(seg_pad_val=1),
    backbone=dict(
        layers=[name for level in levels for name in level],
        channels=[c for level in channels for c in level],
        timesteps=timesteps,
        noise='random',
        dtype='float16',
        memory_format='contiguous',
    ),
    neck=dict(_delete_=True, type='ConcatNeck', levels=channels, order='coarse-to-fine'),
    decode_head=dict(in_channels=[sum(level) for level in channels], pool_scales=(1, 2)),
    auxiliary_head=dict(in_channels=sum(channels[1]), channels=512),
)

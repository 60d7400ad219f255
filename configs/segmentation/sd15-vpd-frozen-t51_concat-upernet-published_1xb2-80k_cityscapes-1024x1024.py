_base_ = [
    '../_base_/models/vpd_sd15_published.py',
    '../_base_/datasets/cityscapes_1024x1024_published.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_adamw_80k.py',
]

tokens = 77
channels = [*_base_.channels, [2 * 2 * tokens]]  # attention of two kinds in two sizes to each token, stride 8
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        attention_maps=['down_cross', 'up_cross'],
        channels=[c for level in channels for c in level],
        conditioner=dict(num_prompts=tokens),
    ),
    neck=dict(levels=channels),
    decode_head=dict(
        in_channels=[sum(level) for level in channels],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        num_classes=19,
    ),
    auxiliary_head=dict(num_classes=19),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(512, 512)),
)

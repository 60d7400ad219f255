_base_ = [
    '../_base_/models/vpd_sd15.py',
    '../_base_/datasets/cityscapes_1024x1024.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_vpd_80k.py',
]

num_classes = 19
levels = [
    {name: num_classes if name.startswith('attn') else channels for name, channels in level.items()}
    for level in _base_.levels
]
channels = [list(level.values()) for level in levels]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        channels=[c for level in channels for c in level],
        conditioner=dict(dataset='CityscapesDataset'),
        frozen=True,
    ),
    neck=dict(
        necks=[
            dict(type='ConcatNeck', levels=channels),
            dict(type='FPN', in_channels=[sum(level) for level in channels], out_channels=256, num_outs=4),
        ],
    ),
    decode_head=dict(num_classes=num_classes),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(683, 683)),
)
sync_bn = 'torch'

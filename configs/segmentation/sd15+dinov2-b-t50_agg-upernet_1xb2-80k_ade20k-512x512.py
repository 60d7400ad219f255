_base_ = [
    '../_base_/models/diffusion_sd15_dinov2_b.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_adamw_80k.py',
]

backbones = [dict(_base_.backbones[0], prompt=_base_.prompt), _base_.backbones[1]]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(backbones=backbones),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(341, 341)),
)

_base_ = [
    '../_base_/models/diffusion_sdxl_playground.py',
    '../_base_/datasets/cityscapes_1024x1024.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_adamw_80k.py',
]

backbones = [dict(backbone, prompt=_base_.prompt) for backbone in _base_.backbones]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(backbones=backbones),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(683, 683)),
)

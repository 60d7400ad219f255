_base_ = [
    '../_base_/models/diffusion_sd15_flux_dev.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_adamw_80k.py',
]

backbones = [dict(backbone, prompt=_base_.prompt) for backbone in _base_.backbones]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(backbones=backbones),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(341, 341)),
)

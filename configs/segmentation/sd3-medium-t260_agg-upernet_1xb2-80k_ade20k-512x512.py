_base_ = [
    '../_base_/models/diffusion_sd3_medium.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_adamw_80k.py',
]

model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(prompt=_base_.prompt),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(341, 341)),
)

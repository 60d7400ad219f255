_base_ = [
    '../_base_/models/metaprompts_sd15.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_vpd_80k.py',
]

model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(frozen=True),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(341, 341)),
)
train_dataloader = dict(batch_size=1)
sync_bn = 'torch'
default_hooks = dict(checkpoint=dict(save_best='mIoU'))  # of the validations every 8000 iterations

_base_ = [
    '../_base_/models/diffusion_sdxl.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_adamw_80k.py',
]

crop_size = (512, 512)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        prompt='a highly realistic photo of the real world. '
        'It can be an indoor scene, or an outdoor scene, or a photo of nature. high quality.'
    ),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(341, 341)),
)
train_dataloader = dict(batch_size=2)

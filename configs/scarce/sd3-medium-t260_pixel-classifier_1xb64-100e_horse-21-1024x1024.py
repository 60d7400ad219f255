_base_ = [
    '../_base_/models/diffusion_sd3_medium.py',
    '../_base_/datasets/scarce_1024.py',
    '../_base_/pixel_classifier_runtime.py',
    '../_base_/schedules/schedule_pixel_classifier.py',
]

category = dict(category='horse_21', data_root='data/horse_21')
model = dict(
    data_preprocessor=dict(size_divisor=1),
    backbone=dict(prompt='a photo of a horse'),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type='PixelClassifierHead',
        in_channels=_base_.model.backbone.channels,
        num_classes=21,
        output_size=256,
    ),
    auxiliary_head=None,
)
train_dataloader = dict(dataset=category)
test_dataloader = dict(dataset=category)

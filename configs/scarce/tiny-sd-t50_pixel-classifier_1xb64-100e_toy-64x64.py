_base_ = [
    '../_base_/models/diffusion_tiny_sd.py',
    '../_base_/datasets/toy.py',
    '../_base_/pixel_classifier_runtime.py',
    '../_base_/schedules/schedule_pixel_classifier.py',
]

model = dict(
    backbone=dict(timesteps=[50]),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type='PixelClassifierHead',
        in_channels=_base_.model.backbone.channels,
        num_classes=_base_.num_classes,
    ),
)
train_dataloader = dict(
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=False),
    dataset=dict(pipeline=_base_.test_pipeline),
)
val_dataloader = None
val_evaluator = None
test_evaluator = dict(type='ScarceIoUMetric')

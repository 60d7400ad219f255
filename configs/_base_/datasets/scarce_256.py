# DatasetDDPM folders for models that read 256x256 pictures; labels are trained and compared at 256x256, as published
dataset_type = 'ScarceDataset'
load = dict(type='LoadImageFromFile', imdecode_backend='pillow')
resize = dict(type='Resize', scale=(256, 256), keep_ratio=False, backend='pillow', interpolation='bilinear')
labels = dict(type='LoadLabelArray', size=256)
train_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        split='real/train',
        pipeline=[load, resize, labels, dict(type='IgnoreSmallClasses', min_pixels=20), dict(type='PackSegInputs')],
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type=dataset_type, split='real/test', pipeline=[load, resize, labels, dict(type='PackSegInputs')]),
)
test_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU']), dict(type='ScarceIoUMetric')]

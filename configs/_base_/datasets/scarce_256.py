# DatasetDDPM folders for models that read 256x256 pictures; labels are trained and compared at 256x256, as published
dataset_type = 'ScarceDataset'
load = dict(type='LoadImageFromFile', imdecode_backend='pillow')
resize = dict(type='Resize', scale=(256, 256), keep_ratio=False, backend='pillow', interpolation='bilinear')
labels = dict(type='LoadLabelArray', size=256)
pack = dict(type='PackSegInputs')
train_pipeline = [load, resize, labels, dict(type='IgnoreSmallClasses', min_pixels=20), pack]
test_pipeline = [load, resize, labels, pack]
flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0, direction='horizontal')]
tta_pipeline = [load, dict(type='TestTimeAug', transforms=[[resize], flips, [labels], [pack]])]
train_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type=dataset_type, split='real/train', pipeline=train_pipeline),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type=dataset_type, split='real/test', pipeline=test_pipeline),
)
test_evaluator = dict(type='ScarceIoUMetric', iou_metrics=['mIoU'])

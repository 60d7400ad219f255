# pictures of any folder, 64 of them held out: the shorter side resized to 512 pixels, and a square of it
size = 512
dataset = dict(type='ImageFolderDataset', data_root='data/distillation', held_out=64)
load = [
    dict(type='LoadImageFromFile', imdecode_backend='pillow'),
    dict(type='Resize', scale=(100_000, size), keep_ratio=True),
]
train_pipeline = [*load, dict(type='RandomCrop', crop_size=(size, size)), dict(type='PackSegInputs')]
val_pipeline = [*load, dict(type='CenterCrop', crop_size=size), dict(type='PackSegInputs')]
train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(dataset, part='train', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(dataset, part='val', pipeline=val_pipeline),
)
test_dataloader = val_dataloader

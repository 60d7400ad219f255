# PF-Pascal at 512 x 512; published figures have the base "img".
dataset_type = 'PFPascalDataset'
data_root = 'data/PF-dataset-PASCAL'
pipeline = [
    dict(type='LoadPair'),
    dict(type='ResizePair', size=512),
    dict(type='PackPair'),
]
train_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    collate_fn=dict(type='pseudo_collate'),
    dataset=dict(type=dataset_type, data_root=data_root, split='trn', pipeline=pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='pseudo_collate'),
    dataset=dict(type=dataset_type, data_root=data_root, split='val', pipeline=pipeline, test_mode=True),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='pseudo_collate'),
    dataset=dict(type=dataset_type, data_root=data_root, split='test', pipeline=pipeline, test_mode=True),
)
val_evaluator = dict(type='PCKMetric', thresholds=(0.01, 0.05, 0.1, 0.15), bases=('bbox', 'img'))
test_evaluator = dict(val_evaluator, out_file='pck.json')

# Pairs of toy quadrupeds at their own size, 64 x 64, drawn by
#   python tools/toy/make_data.py data --pairs 50 --across 20
# data_root = 'data/SPair-toy' has pairs within a species, 'data/SPair-toy-across' across species.
dataset_type = 'ToyPairDataset'
data_root = 'data/SPair-toy'
pipeline = [
    dict(type='LoadPair'),
    dict(type='PackPair'),
]
train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    collate_fn=dict(type='pseudo_collate'),
    dataset=dict(type=dataset_type, data_root=data_root, split='trn', pipeline=pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='pseudo_collate'),
    dataset=dict(type=dataset_type, data_root=data_root, split='val', pipeline=pipeline, test_mode=True),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='pseudo_collate'),
    dataset=dict(type=dataset_type, data_root=data_root, split='test', pipeline=pipeline, test_mode=True),
)
val_evaluator = dict(type='PCKMetric', thresholds=(0.01, 0.05, 0.1, 0.15), bases=('bbox', 'img'))
test_evaluator = dict(val_evaluator, out_file='pck.json')

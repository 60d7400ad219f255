# CUB by the protocol of Neural Congealing: 14 subsets of 25 birds, cropped to 256 x 256; the base is "img".
dataset_type = 'CUBPairsDataset'
data_root = 'data/CUB'
pipeline = [
    dict(type='LoadPair'),
    dict(type='CropToBoxPair', size=256),
    dict(type='ResizePair', size=512),
    dict(type='PackPair'),
]
test_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='pseudo_collate'),
    dataset=dict(type=dataset_type, data_root=data_root, protocol='subsets', pipeline=pipeline, test_mode=True),
)
test_evaluator = dict(type='PCKMetric', thresholds=(0.01, 0.05, 0.1, 0.15), bases=('bbox', 'img'), out_file='pck.json')

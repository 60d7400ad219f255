# PF-Willow's 900 test pairs at 512 x 512; the base "bbox" is the extent of the target's keypoints.
dataset_type = 'PFWillowDataset'
data_root = 'data/PF-WILLOW'
pipeline = [
    dict(type='LoadPair'),
    dict(type='ResizePair', size=512),
    dict(type='PackPair'),
]
test_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='pseudo_collate'),
    dataset=dict(type=dataset_type, data_root=data_root, split='test', pipeline=pipeline, test_mode=True),
)
test_evaluator = dict(type='PCKMetric', thresholds=(0.01, 0.05, 0.1, 0.15), bases=('bbox', 'img'), out_file='pck.json')

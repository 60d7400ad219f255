# AP-10K's test pairs of one species at 512 x 512, as GeoAware-SC pairs them; for others set the data set's protocol to
# 'cross-species' or 'cross-family'.
dataset_type = 'AP10KDataset'
data_root = 'data/ap-10k'
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
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        split='test',
        protocol='intra-species',
        pipeline=pipeline,
        test_mode=True,
    ),
)
test_evaluator = dict(type='PCKMetric', thresholds=(0.01, 0.05, 0.1, 0.15), bases=('bbox', 'img'), out_file='pck.json')

# TSS's pairs both ways at 512 x 512; the published figure is PCK@0.05-img over all pixels, step=1
dataset_type = 'TSSDataset'
data_root = 'data/TSS_CVPR2016'
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
test_evaluator = dict(type='PCKMetric', thresholds=(0.05, 0.1), bases=('img',), out_file='pck.json')

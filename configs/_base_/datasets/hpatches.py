# HPatches: 540 pairs of the 108 sequences that D2-Net keeps, at 768 x 768; SuperPoint's 1000 points of each image.
# Without their files, keypoints=None lets DetectKeypoints find points.
pipeline = [
    dict(type='LoadPair'),
    dict(type='DetectKeypoints', num_points=1000),
    dict(type='ResizePair', size=768),
    dict(type='PackHomographyPair'),
]
test_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='pseudo_collate'),
    dataset=dict(
        type='HPatchesDataset',
        data_root='data/hpatches-sequences-release',
        keypoints='data/superpoint-1k',
        pipeline=pipeline,
    ),
)
test_evaluator = dict(type='HomographyMetric', method='ransac', threshold=3, out_file='homography.json')

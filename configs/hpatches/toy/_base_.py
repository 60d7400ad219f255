# What the study on toy sequences shares: SIFT's 300 strongest points, images at their own size. The sequences:
#   python tools/toy/make_hpatches.py data
_base_ = [
    '../../_base_/datasets/hpatches.py',
    '../../_base_/hpatches_runtime.py',
    '../../_base_/schedules/test_only.py',
]

model = dict(
    type='SparseMatcher',
    backbone=dict(type='DiffusionBackbone', model='{{ fileDirname }}/../../../demo/tiny-sd'),
)
pipeline = [dict(type='LoadPair'), dict(type='DetectKeypoints', num_points=300), dict(type='PackHomographyPair')]
test_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root='data/HPatches-toy', keypoints=None, pipeline=pipeline),
)

# DIFT_sd (arXiv 2306.03881): the output of the decoder's block 2, averaged over eight draws of noise
_base_ = [
    '../_base_/datasets/hpatches.py',
    '../_base_/hpatches_runtime.py',
    '../_base_/schedules/test_only.py',
]

model = dict(
    type='SparseMatcher',
    backbone=dict(
        type='DiffusionBackbone',
        model='sd21',
        layers=['up-level2-upsampler-out'],
        channels=[640],
        timesteps=[0],
        ensemble=8,
    ),
    metric='cosine',
)
test_evaluator = dict(method='lmeds')

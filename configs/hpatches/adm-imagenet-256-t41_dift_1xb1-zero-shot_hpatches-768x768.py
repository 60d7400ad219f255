# DIFT_adm (arXiv 2306.03881): guided-diffusion's output_blocks.11, averaged over four draws of noise
_base_ = [
    '../_base_/datasets/hpatches.py',
    '../_base_/hpatches_runtime.py',
    '../_base_/schedules/test_only.py',
]

model = dict(
    type='SparseMatcher',
    backbone=dict(
        type='DiffusionBackbone',
        model='adm-imagenet-256',
        layers=['adm-11'],
        channels=[512],
        timesteps=[41],
        ensemble=4,
    ),
    metric='l2',
)

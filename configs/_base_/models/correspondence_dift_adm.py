# DIFT_adm (arXiv 2306.03881): guided-diffusion's output_blocks.4, averaged over eight draws of noise
model = dict(
    type='CorrespondenceModel',
    backbone=dict(
        type='DiffusionBackbone',
        model='adm-imagenet-256',
        layers=['adm-4'],
        channels=[1024],
        timesteps=[101],
        ensemble=8,
    ),
)

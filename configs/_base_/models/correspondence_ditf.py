# DiTF (arXiv 2505.18584) with FLUX.1-dev: the input of block 28 of 57, counted over both stacks, averaged over eight
# draws of noise: here the raw one
model = dict(
    type='CorrespondenceModel',
    backbone=dict(
        type='DiffusionBackbone',
        model='flux-dev',
        layers=['vit-block28-in'],
        channels=[3072],
        timesteps=[260],  # sigma 0.26
        ensemble=8,
        embedded_guidance=3.5,
        dtype='bfloat16',
    ),
    prompt='a photo of a {category}',
)

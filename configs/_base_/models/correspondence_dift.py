# DIFT (arXiv 2306.03881): the output of the decoder's block 1, averaged over eight draws of noise
model = dict(
    type='CorrespondenceModel',
    backbone=dict(
        type='DiffusionBackbone',
        model='sd21',
        layers=['up-level1-upsampler-out'],
        channels=[1280],
        timesteps=[261],
        ensemble=8,
    ),
    prompt='a photo of a {category}',
)

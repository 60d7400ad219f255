# DIFT_sd (arXiv 2306.03881) on DAVIS: the output of the decoder's block 2, stride 8, averaged over eight draws of noise
model = dict(
    type='LabelPropagator',
    backbone=dict(
        type='DiffusionBackbone',
        model='sd21',
        layers=['up-level2-upsampler-out'],
        channels=[640],
        timesteps=[51],
        ensemble=8,
    ),
    topk=15,
    radius=15,
    temperature=0.2,
    previous_frames=28,
)

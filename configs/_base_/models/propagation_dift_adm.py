# DIFT_adm (arXiv 2306.03881) on DAVIS: the output of guided-diffusion's output_blocks.7, stride 8, averaged over four
# draws of noise
model = dict(
    type='LabelPropagator',
    backbone=dict(
        type='DiffusionBackbone',
        model='adm-imagenet-256',
        layers=['adm-7'],
        channels=[512],
        timesteps=[51],
        ensemble=4,
    ),
    topk=10,
    radius=15,
    temperature=0.1,
    previous_frames=28,
)

# DiTF (arXiv 2505.18584) with FLUX.1-dev on DAVIS: the modulated input of block 24, stride 16, without two channels of
# massive activations, averaged over eight draws of noise; how labels are propagated is DIFT's
model = dict(
    type='LabelPropagator',
    backbone=dict(
        type='DiffusionBackbone',
        model='flux-dev',
        layers=['vit-block24-mod'],
        channels=[3072],
        timesteps=[90],  # sigma 0.09
        ensemble=8,
        average_draws=True,
        discard=[154, 1446],
        embedded_guidance=3.5,
        dtype='bfloat16',
    ),
    topk=15,
    radius=15,
    temperature=0.2,
    previous_frames=28,
)

# FLUX.1-dev: the modulated inputs of two of its 57 blocks, those of DiTF (arXiv 2505.18584)
_base_ = './correspondence_agg.py'

layers = {'vit-block24-mod': 3072, 'vit-block28-mod': 3072}  # stride 16
timesteps = [260]  # sigma 0.26
model = dict(
    backbone=dict(
        model='flux-dev',
        layers=list(layers),
        channels=list(layers.values()),
        timesteps=timesteps,
        dtype='bfloat16',
    ),
    neck=dict(
        levels=[list(layers.values())],
        timesteps=len(timesteps),
        layer_names=[list(layers)],
        timestep_names=timesteps,
    ),
    prompt='a photo of a {category}',
)

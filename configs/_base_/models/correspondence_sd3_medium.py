# Stable Diffusion 3 medium: the modulated inputs of two of its 24 blocks (not searched for; see tools/search.py)
_base_ = './correspondence_agg.py'

layers = {'vit-block9-mod': 1536, 'vit-block14-mod': 1536}  # stride 16
timesteps = [260]  # sigma 0.26
model = dict(
    backbone=dict(
        model='sd3-medium',
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

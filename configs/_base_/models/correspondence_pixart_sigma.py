# PixArt-Sigma: the modulated inputs of two of its 28 blocks (not searched for; see tools/search.py)
_base_ = './correspondence_agg.py'

layers = {'vit-block12-mod': 1152, 'vit-block16-mod': 1152}  # stride 16
timesteps = [50]
model = dict(
    backbone=dict(
        model='pixart-sigma',
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

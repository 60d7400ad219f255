# Stable Diffusion 3 medium: the modulated inputs of two of its 24 blocks (not searched for; see tools/search.py)
_base_ = './diffusion_upernet.py'

levels = [{'vit-block9-mod': 1536}, {'vit-block14-mod': 1536}]  # both of stride 16, in 1024 x 1024 pixels
timesteps = [260]  # sigma 0.26
model = dict(
    backbone=dict(
        model='sd3-medium',
        layers=[name for level in levels for name in level],
        channels=[channels for level in levels for channels in level.values()],
        timesteps=timesteps,
        input_size=1024,
        dtype='bfloat16',
    ),
    neck=dict(
        levels=[list(level.values()) for level in levels],
        timesteps=len(timesteps),
        layer_names=[list(level) for level in levels],
        timestep_names=timesteps,
    ),
    decode_head=dict(in_channels=[512, 512], in_index=[0, 1]),
)

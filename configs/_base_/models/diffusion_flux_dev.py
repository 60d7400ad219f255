# FLUX.1-dev: the modulated inputs of two of its 57 blocks, those of DiTF (arXiv 2505.18584)
_base_ = './diffusion_upernet.py'

levels = [{'vit-block24-mod': 3072}, {'vit-block28-mod': 3072}]  # both of stride 16, in 1024 x 1024 pixels
timesteps = [260]  # sigma 0.26
model = dict(
    backbone=dict(
        model='flux-dev',
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

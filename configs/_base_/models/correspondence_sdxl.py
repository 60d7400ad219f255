# the activations that Generic Diffusion Feature recommends for Stable Diffusion XL (config_xl_practical)
_base_ = './correspondence_agg.py'

layers = {
    'up-level0-repeat0-vit-block5-out': 1280,  # stride 32
    'up-level0-repeat0-vit-block7-out': 1280,  # stride 32
    'up-level1-repeat0-vit-block0-cross-q': 640,  # stride 16
    'up-level1-repeat0-vit-block0-out': 640,  # stride 16
}
timesteps = [50]
model = dict(
    backbone=dict(model='sdxl', layers=list(layers), channels=list(layers.values()), timesteps=timesteps),
    neck=dict(
        levels=[list(layers.values())],
        timesteps=len(timesteps),
        layer_names=[list(layers)],
        timestep_names=timesteps,
    ),
    prompt='a photo of a {category}',
)

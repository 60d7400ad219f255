# the activations that Generic Diffusion Feature recommends for Stable Diffusion 1.5 (config_15_practical)
_base_ = './correspondence_agg.py'

layers = {
    'up-level1-repeat1-vit-block0-cross-q': 1280,  # stride 32
    'up-level1-repeat2-res-out': 1280,  # stride 32
    'up-level2-repeat1-vit-block0-cross-q': 640,  # stride 16
    'up-level3-repeat0-vit-block0-self-k': 320,  # stride 8
}
timesteps = [50]
model = dict(
    backbone=dict(model='sd15', layers=list(layers), channels=list(layers.values()), timesteps=timesteps),
    neck=dict(
        levels=[list(layers.values())],
        timesteps=len(timesteps),
        layer_names=[list(layers)],
        timestep_names=timesteps,
    ),
    prompt='a photo of a {category}',
)

# outputs of the blocks of Stable Diffusion 1.5, as used before Generic Diffusion Feature (its config_15_legacy)
_base_ = './correspondence_agg.py'

layers = {
    'up-level0-upsampler-out': 1280,  # stride 32
    'up-level1-upsampler-out': 1280,  # stride 16
    'up-level2-upsampler-out': 640,  # stride 8
    'up-level3-repeat2-vit-out': 320,  # stride 8
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

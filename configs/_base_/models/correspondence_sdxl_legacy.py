# outputs of the blocks of Stable Diffusion XL, as used before Generic Diffusion Feature (its config_xl_legacy)
_base_ = './correspondence_agg.py'

layers = {
    'up-level0-upsampler-out': 1280,  # stride 16
    'up-level1-upsampler-out': 640,  # stride 8
    'up-level2-repeat2-res-out': 320,  # stride 8
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

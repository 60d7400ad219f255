# one activation of Stable Diffusion XL; the configs that inherit this say which
model = dict(
    type='CorrespondenceModel',
    backbone=dict(type='DiffusionBackbone', model='sdxl', timesteps=[50]),
    prompt='a photo of a {category}',
)

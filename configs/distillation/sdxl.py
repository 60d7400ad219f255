_base_ = ['./_base_.py', '../_base_/datasets/images_1024.py']

layers = {
    'mid-repeat1-res-out': 1280,
    'up-level0-repeat0-vit-out': 1280,
    'up-level0-repeat1-vit-out': 1280,
    'up-level0-upsampler-out': 1280,
    'up-level1-repeat0-vit-out': 640,
    'up-level1-repeat1-vit-out': 640,
    'up-level1-upsampler-out': 640,
    'up-level2-repeat0-res-out': 320,
    'up-level2-repeat1-res-out': 320,
    'up-level2-repeat2-res-out': 320,
}
model = dict(
    backbone=dict(model='sdxl', layers=list(layers), channels=list(layers.values()), gradient_checkpointing=True),
    teacher=dict(dtype='bfloat16'),
)

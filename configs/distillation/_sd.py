_base_ = './_base_.py'

# the middle block and every residual block of the decoder, behind its attention and upsampler if it has them
layers = {
    'mid-repeat1-res-out': 1280,
    'up-level0-repeat0-res-out': 1280,
    'up-level0-repeat1-res-out': 1280,
    'up-level0-upsampler-out': 1280,
    'up-level1-repeat0-vit-out': 1280,
    'up-level1-repeat1-vit-out': 1280,
    'up-level1-upsampler-out': 1280,
    'up-level2-repeat0-vit-out': 640,
    'up-level2-repeat1-vit-out': 640,
    'up-level2-upsampler-out': 640,
    'up-level3-repeat0-vit-out': 320,
    'up-level3-repeat1-vit-out': 320,
    'up-level3-repeat2-vit-out': 320,
}
model = dict(backbone=dict(layers=list(layers), channels=list(layers.values())))

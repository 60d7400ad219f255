# the outputs of whole blocks, which earlier work used
_base_ = './practical_t50_zero-shot.py'

layers = {
    'up-level0-upsampler-out': 96,
    'up-level1-upsampler-out': 96,
    'up-level2-upsampler-out': 64,
    'up-level3-repeat2-vit-out': 48,
}
model = dict(
    backbone=dict(layers=list(layers), channels=list(layers.values())),
    neck=dict(levels=[list(layers.values())]),
)

# the outputs of whole blocks, which earlier work used, with neck and head of the recommended recipe
_base_ = '../ablations/recommended-recipe.py'

levels = [
    {'up-level2-upsampler-out': 64, 'up-level3-repeat2-vit-out': 48},  # stride 4
    {'up-level1-upsampler-out': 96},  # stride 8
    {'up-level0-upsampler-out': 96},  # stride 16
]
model = dict(
    backbone=dict(
        layers=[name for level in levels for name in level],
        channels=[channels for level in levels for channels in level.values()],
    ),
    neck=dict(levels=[list(level.values()) for level in levels], layer_names=[list(level) for level in levels]),
)

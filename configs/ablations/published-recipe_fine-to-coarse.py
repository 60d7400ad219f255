# the published recipe but for the order of the levels
_base_ = './published-recipe.py'

levels = [
    {'up-level3-repeat0-vit-block0-self-k': 48},  # stride 4
    {'up-level2-repeat1-vit-block0-cross-q': 64},  # stride 8
    {'up-level1-repeat1-vit-block0-cross-q': 96, 'up-level1-repeat2-res-out': 96},  # stride 16
]
model = dict(
    backbone=dict(
        layers=[name for level in levels for name in level],
        channels=[channels for level in levels for channels in level.values()],
    ),
    neck=dict(levels=[list(level.values()) for level in levels], order='fine-to-coarse'),
    decode_head=dict(in_channels=[sum(level.values()) for level in levels]),
    auxiliary_head=dict(in_channels=sum(levels[1].values())),
)

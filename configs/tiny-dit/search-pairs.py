# zero-shot matching for tools/search.py, whose layers are ranked on training pairs
_base_ = '../search/pairs.py'

layers = {'vit-block4-mod': 192, 'vit-block5-mod': 192}
model = dict(
    backbone=dict(
        model='{{ fileDirname }}/../../demo/tiny-dit',
        layers=list(layers),
        channels=list(layers.values()),
        timesteps=[350],
    ),
    neck=dict(levels=[list(layers.values())]),
)

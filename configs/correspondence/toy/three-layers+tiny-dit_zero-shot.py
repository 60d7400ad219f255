# two networks, fused as SD + DINO (arXiv 2305.15347) does: the maps of one are normalised together
_base_ = './_zero-shot.py'

layers = {'up-level2-repeat1-vit-out': 64, 'up-level1-repeat1-vit-out': 96, 'up-level0-repeat1-res-out': 96}
tiny_sd = dict(_base_.model.backbone, layers=list(layers), channels=list(layers.values()), timesteps=[100])
tiny_dit = dict(
    tiny_sd,
    model='{{ fileDirname }}/../../../demo/tiny-dit',
    layers=['vit-block5-mod'],
    channels=[192],
    timesteps=[350],
)
model = dict(
    backbone=dict(_delete_=True, type='EnsembleBackbone', backbones=[tiny_sd, tiny_dit]),
    neck=dict(type='ConcatNeck', levels=[[*layers.values(), 192]], normalize=[[3, 1]]),
)

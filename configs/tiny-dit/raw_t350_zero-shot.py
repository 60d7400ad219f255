# DiTF's first row: what goes into the block
_base_ = './_zero-shot.py'

model = dict(backbone=dict(layers=['vit-block5-in']))

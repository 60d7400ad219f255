# one activation, a query of a block that matches well
_base_ = './_zero-shot.py'

model = dict(backbone=dict(layers=['up-level2-repeat0-vit-block0-self-q'], channels=[64]))

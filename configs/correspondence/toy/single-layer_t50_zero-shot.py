# the best activation at this timestep, by tools/analysis/score_layers.py
_base_ = './_zero-shot.py'

model = dict(backbone=dict(layers=['up-level2-repeat0-vit-block0-self-q'], channels=[64]))

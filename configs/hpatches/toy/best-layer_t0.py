# the best, on other scenes (--seed 1), of 98 activations (outputs of blocks, queries, keys) at timesteps 0, 50 and 200
_base_ = './_base_.py'

model = dict(backbone=dict(layers=['down-level0-repeat0-vit-out'], channels=[48], timesteps=[0]))

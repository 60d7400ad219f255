# the best of 98 activations (outputs of blocks, queries, keys) at timesteps 0, 50 and 200 on other scenes (--seed 1),
# with the first 3800 steps of demo/tiny-sd
_base_ = './_base_.py'

model = dict(backbone=dict(layers=['down-level0-repeat0-vit-out'], channels=[48], timesteps=[0]))

# the best of all layers at timesteps 0, 50 and 200 on other scenes (--seed 1)
_base_ = './_base_.py'

model = dict(backbone=dict(layers=['down-level0-repeat0-vit-out'], channels=[48], timesteps=[0]))

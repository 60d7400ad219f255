# among the best of all layers at timesteps 0, 50 and 200 on the first three scenes
_base_ = './_base_.py'

model = dict(backbone=dict(layers=['up-level3-repeat0-res-out'], channels=[48], timesteps=[50]))

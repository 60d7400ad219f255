# layer, timestep and temperature chosen on the four training clips
_base_ = ['./_base_.py', '../../_base_/datasets/davis.py']

model = dict(backbone=dict(layers=['up-level3-repeat0-vit-block0-self-q'], channels=[48], timesteps=[1]))
test_dataloader = dict(dataset=dict(data_root='data/DAVIS-toy', pipeline=[dict(type='LoadVideo', short_side=96)]))

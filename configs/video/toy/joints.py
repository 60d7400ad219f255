# DIFT's block of the decoder and its timestep; chosen, with the window, on clips of another seed
_base_ = ['./_base_.py', '../../_base_/datasets/jhmdb.py']

model = dict(
    backbone=dict(layers=['up-level2-upsampler-out'], channels=[64], timesteps=[51]),
    labels='joints',
)
test_dataloader = dict(dataset=dict(data_root='data/JHMDB-toy', pipeline=[dict(type='LoadVideo', size=(96, 160))]))

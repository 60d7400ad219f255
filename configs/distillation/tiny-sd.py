# The small model of the demo on toy pictures, of another series than those that it is tested on:
#   python tools/toy/make_data.py data/distillation --train 2112 --test 0 --seed 3
_base_ = ['./_base_.py', '../_base_/datasets/images_512.py']

layers = {
    'mid-repeat1-res-out': 96,
    'up-level0-repeat0-res-out': 96,
    'up-level0-repeat1-res-out': 96,
    'up-level0-upsampler-out': 96,
    'up-level1-repeat0-vit-out': 96,
    'up-level1-repeat1-vit-out': 96,
    'up-level1-upsampler-out': 96,
    'up-level2-repeat0-vit-out': 64,
    'up-level2-repeat1-vit-out': 64,
    'up-level2-upsampler-out': 64,
    'up-level3-repeat0-vit-out': 48,
    'up-level3-repeat1-vit-out': 48,
    'up-level3-repeat2-vit-out': 48,
}
model = dict(
    backbone=dict(model='{{ fileDirname }}/../../demo/tiny-sd', layers=list(layers), channels=list(layers.values())),
    timestep=50,  # where eight draws of noise are best here, as 261 is for DIFT on SD 2.1
)
size = 64
load = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]  # of that size already
data = dict(data_root='data/distillation', held_out=32, pipeline=load)
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=data)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=data)
test_dataloader = val_dataloader
max_iters = 40
train_cfg = dict(max_iters=max_iters, val_interval=20)
optim_wrapper = dict(
    optimizer=dict(lr=3e-5),
    paramwise_cfg=dict(custom_keys=dict(learned_timestep=dict(lr_mult=30))),
)
default_hooks = dict(checkpoint=dict(interval=20))

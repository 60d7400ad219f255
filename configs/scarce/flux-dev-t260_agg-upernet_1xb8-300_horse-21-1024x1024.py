# FLUX.1-dev with an mmseg head in place of pixel classifiers
_base_ = [
    '../_base_/models/diffusion_flux_dev.py',
    '../_base_/datasets/scarce_1024.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_scarce_300.py',
]

category = dict(category='horse_21', data_root='data/horse_21')
model = dict(
    data_preprocessor=dict(size_divisor=1),
    backbone=dict(prompt='a photo of a horse'),
    decode_head=dict(num_classes=21),
    auxiliary_head=None,
)
train_dataloader = dict(batch_size=8, sampler=dict(type='InfiniteSampler', shuffle=True), dataset=category)
test_dataloader = dict(dataset=category)

# SD-Layer-4 of Diffusion Hyperfeatures: the fourth of its twelve layers, which the released code counts from 1, resized
# from 16 x 16 to 64 x 64 as all its maps and from there to 512 x 512; the latent is taken to be clean
_base_ = [
    '../_base_/models/correspondence_dhf_clean.py',
    '../_base_/datasets/spair_dhf.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

model = dict(
    backbone=dict(layers=['up-level1-repeat0-res-increment'], channels=[1280]),
    neck=dict(_delete_=True, type='ConcatNeck', levels=[[1280]], output_sizes=[64]),
    match_size=512,
)
train_dataloader = val_dataloader = val_evaluator = None

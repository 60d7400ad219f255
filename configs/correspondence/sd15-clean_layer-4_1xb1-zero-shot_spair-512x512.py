# SD-Layer-4 of Diffusion Hyperfeatures; that layer is taken to be index 4 of its twelve, and the latent to be clean
_base_ = [
    '../_base_/models/correspondence_dhf_clean.py',
    '../_base_/datasets/spair_dhf.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

model = dict(backbone=dict(layers=['up-level1-repeat1-res-increment'], channels=[1280]), neck=None, match_size=512)
train_dataloader = val_dataloader = val_evaluator = None

# SD-Layer-Pruned of Diffusion Hyperfeatures: the layer and timestep to which its aggregation network was pruned,
# without that network. Which they were is not published; these are those of sd15-clean_agg-pruned.
_base_ = [
    '../_base_/models/correspondence_dhf_clean.py',
    '../_base_/datasets/spair_dhf.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

model = dict(
    backbone=dict(layers=['up-level1-repeat1-res-increment'], channels=[1280]),
    neck=dict(_delete_=True, type='ConcatNeck', levels=[[1280]], output_sizes=[64]),
    match_size=512,
)
train_dataloader = val_dataloader = val_evaluator = None

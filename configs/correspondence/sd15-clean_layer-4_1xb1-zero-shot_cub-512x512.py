_base_ = [
    '../_base_/models/correspondence_dhf_clean.py',
    '../_base_/datasets/cub_dhf.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

model = dict(
    backbone=dict(layers=['up-level1-repeat0-res-increment'], channels=[1280]),
    neck=dict(_delete_=True, type='ConcatNeck', levels=[[1280]], output_sizes=[64]),
    match_size=512,
)

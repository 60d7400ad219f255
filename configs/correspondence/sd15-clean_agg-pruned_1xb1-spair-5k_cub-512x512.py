_base_ = [
    '../_base_/models/correspondence_dhf_clean.py',
    '../_base_/datasets/cub_random.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

layer, channels = 'up-level1-repeat1-res-increment', 1280
model = dict(
    backbone=dict(layers=[layer], channels=[channels]),
    neck=dict(levels=[[channels]], layer_names=[[layer]]),
)

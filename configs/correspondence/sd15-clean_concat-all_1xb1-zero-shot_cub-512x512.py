_base_ = [
    '../_base_/models/correspondence_dhf_clean.py',
    '../_base_/datasets/cub_dhf.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

model = dict(
    neck=dict(_delete_=True, type='ConcatNeck', levels=[list(_base_.layers.values())], output_sizes=[64]),
    match_size=512,
)

_base_ = [
    '../_base_/models/correspondence_dhf.py',
    '../_base_/datasets/spair_dhf.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/schedule_dhf_5k.py',
]

model = dict(
    backbone=dict(noise='random', dtype='float16', memory_format='contiguous'),
    neck=dict(resize='before'),
    match_size=512,
)
train_cfg = dict(max_iters=4000)  # of 5000 steps, the last whose weights the released code saves

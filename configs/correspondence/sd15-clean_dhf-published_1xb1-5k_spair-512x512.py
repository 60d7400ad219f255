_base_ = [
    '../_base_/models/correspondence_dhf_clean.py',
    '../_base_/datasets/spair_dhf.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/schedule_dhf_5k.py',
]

model = dict(backbone=dict(noise='random'), neck=dict(resize='before'), match_size=512)

_base_ = [
    '../_base_/models/correspondence_dhf_clean.py',
    '../_base_/datasets/spair.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/schedule_dhf_5k.py',
]

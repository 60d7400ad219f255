_base_ = [
    '../_base_/models/correspondence_dhf.py',
    '../_base_/datasets/cub_random.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

_base_ = [
    '../_base_/models/correspondence_sdxl_sd15_playground.py',
    '../_base_/datasets/spair.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/schedule_dhf_5k.py',
]

pipeline = [dict(type='LoadPair'), dict(type='PackPair')]  # each network has its own size
train_dataloader = val_dataloader = test_dataloader = dict(dataset=dict(pipeline=pipeline))

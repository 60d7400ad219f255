_base_ = [
    '../_base_/models/correspondence_pixart_sigma.py',
    '../_base_/datasets/spair.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/schedule_dhf_5k.py',
]

pipeline = [dict(type='LoadPair'), dict(type='ResizePair', size=1024), dict(type='PackPair')]
train_dataloader = val_dataloader = test_dataloader = dict(dataset=dict(pipeline=pipeline))

_base_ = [
    '../_base_/models/correspondence_dift.py',
    '../_base_/datasets/spair_u.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

pipeline = [dict(type='LoadPair'), dict(type='ResizePair', size=768), dict(type='PackPair')]
test_dataloader = dict(dataset=dict(pipeline=pipeline))

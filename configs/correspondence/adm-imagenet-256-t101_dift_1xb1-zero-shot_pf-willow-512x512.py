_base_ = [
    '../_base_/models/correspondence_dift_adm.py',
    '../_base_/datasets/pf_willow.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

pipeline = [dict(type='LoadPair'), dict(type='ResizePair', size=512), dict(type='PackPair')]
test_dataloader = dict(dataset=dict(pipeline=pipeline))

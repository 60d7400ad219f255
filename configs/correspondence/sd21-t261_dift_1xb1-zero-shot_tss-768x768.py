_base_ = [
    '../_base_/models/correspondence_dift.py',
    '../_base_/datasets/tss.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

model = dict(prompt=None)  # the groups are no words
pipeline = [dict(type='LoadPair'), dict(type='ResizePair', size=768), dict(type='PackPair')]
test_dataloader = dict(dataset=dict(pipeline=pipeline))

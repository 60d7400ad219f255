_base_ = [
    '../_base_/models/correspondence_dift.py',
    '../_base_/datasets/pf_willow.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

model = dict(prompt=None)  # its categories are no words, and what the paper's prompt was is not published
pipeline = [dict(type='LoadPair'), dict(type='ResizePair', size=768), dict(type='PackPair')]
test_dataloader = dict(dataset=dict(pipeline=pipeline))

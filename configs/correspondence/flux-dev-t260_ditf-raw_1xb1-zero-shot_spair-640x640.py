_base_ = [
    '../_base_/models/correspondence_ditf.py',
    '../_base_/datasets/spair_test.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

resize = dict(type='ResizePair', size=640, keep_ratio=True, divisor=16)
test_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadPair'), resize, dict(type='PackPair')]))

# as many cells as DINOv2 has at 840 pixels
_base_ = [
    '../_base_/datasets/spair_u.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

model = dict(
    type='CorrespondenceModel',
    backbone=dict(type='VisionBackbone', model='dinov3-b', layers=[12], channels=[768]),
)
pipeline = [dict(type='LoadPair'), dict(type='ResizePair', size=960), dict(type='PackPair')]
test_dataloader = dict(dataset=dict(pipeline=pipeline))

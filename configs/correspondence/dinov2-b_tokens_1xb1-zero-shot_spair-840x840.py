# the last block's tokens, at the size that SD + DINO (arXiv 2305.15347) reads them; there the aspect ratio is kept
_base_ = [
    '../_base_/datasets/spair_test.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

model = dict(
    type='CorrespondenceModel',
    backbone=dict(type='VisionBackbone', model='dinov2-b', layers=[12], channels=[768], layernorm=False),
)
pipeline = [dict(type='LoadPair'), dict(type='ResizePair', size=840), dict(type='PackPair')]
test_dataloader = dict(dataset=dict(pipeline=pipeline))

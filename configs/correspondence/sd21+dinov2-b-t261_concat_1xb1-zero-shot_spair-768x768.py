# DIFT and DINOv2, each of unit length, concatenated, as SD + DINO (arXiv 2305.15347) does with principal components of
# other layers of Stable Diffusion
_base_ = [
    '../_base_/models/correspondence_dift.py',
    '../_base_/datasets/spair_test.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

dift = _base_.model.backbone
dinov2 = dict(type='VisionBackbone', model='dinov2-b', layers=[12], channels=[768], layernorm=False, input_size=840)
model = dict(
    backbone=dict(_delete_=True, type='EnsembleBackbone', backbones=[dift, dinov2]),
    neck=dict(type='ConcatNeck', levels=[[*dift.channels, *dinov2['channels']]], normalize=True),
)
pipeline = [dict(type='LoadPair'), dict(type='ResizePair', size=768), dict(type='PackPair')]
test_dataloader = dict(dataset=dict(pipeline=pipeline))

# DINO as a baseline of DIFT (arXiv 2306.03881), whose released code applies the final norm; which block it reads of
# which size of image is not published. Here: three quarters up, with as many cells as DIFT's maps have.
_base_ = [
    '../_base_/datasets/spair_test.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

model = dict(
    type='CorrespondenceModel',
    backbone=dict(type='VisionBackbone', model='dino-b8', layers=[9], channels=[768]),
)
pipeline = [dict(type='LoadPair'), dict(type='ResizePair', size=384), dict(type='PackPair')]
test_dataloader = dict(dataset=dict(pipeline=pipeline))

# OpenCLIP as a baseline of DIFT (arXiv 2306.03881), whose released code reads the output of a block as it is; which
# block of which size of image is not published. Here: three quarters up, with as many cells as DIFT's maps have.
_base_ = [
    '../_base_/datasets/spair_test.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

model = dict(
    type='CorrespondenceModel',
    backbone=dict(type='VisionBackbone', model='openclip-h14', layers=[24], channels=[1280], layernorm=False),
)
pipeline = [dict(type='LoadPair'), dict(type='ResizePair', size=672), dict(type='PackPair')]
test_dataloader = dict(dataset=dict(pipeline=pipeline))

_base_ = [
    '../_base_/models/propagation_ditf.py',
    '../_base_/datasets/davis.py',
    '../_base_/video_runtime.py',
]

load = dict(type='LoadVideo', long_side=960, divisor=16)
test_dataloader = dict(dataset=dict(pipeline=[load]))

_base_ = [
    '../_base_/models/correspondence_sdxl_layer.py',
    '../_base_/datasets/spair_test.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

model = dict(backbone=dict(layers=['up-level0-repeat0-vit-block5-out'], channels=[1280]))
pipeline = [dict(type='LoadPair'), dict(type='ResizePair', size=1024), dict(type='PackPair')]
test_dataloader = dict(dataset=dict(pipeline=pipeline))

# SPair-71k as Diffusion Hyperfeatures evaluates: lists of 360 pairs, 20 of each category, from its folder `annotations`
_base_ = './spair.py'

pipeline = [
    dict(type='LoadPair'),
    dict(type='ResizePair', size=512, interpolation='bilinear'),
    dict(type='PackPair'),
]
train_dataloader = dict(dataset=dict(pipeline=pipeline))
val_dataloader = dict(dataset=dict(pipeline=pipeline, ann_file='spair_71k_val-360.json'))
test_dataloader = dict(dataset=dict(pipeline=pipeline, ann_file='spair_71k_test-360.json'))

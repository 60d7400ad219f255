# random pairs of CUB, resized as Diffusion Hyperfeatures does
_base_ = './cub_random.py'

pipeline = [
    dict(type='LoadPair'),
    dict(type='ResizePair', size=512, interpolation='bilinear'),
    dict(type='PackPair'),
]
test_dataloader = dict(dataset=dict(pipeline=pipeline))

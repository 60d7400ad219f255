# CUB as a stand-in for the pairs of Diffusion Hyperfeatures, which are not published: 360 random ones, see
# CUBPairsDataset
_base_ = './cub.py'

pipeline = [dict(type='LoadPair'), dict(type='ResizePair', size=512), dict(type='PackPair')]
test_dataloader = dict(dataset=dict(protocol='random', pipeline=pipeline))

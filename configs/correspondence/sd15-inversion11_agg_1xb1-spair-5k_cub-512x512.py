_base_ = [
    '../_base_/models/correspondence_dhf.py',
    '../_base_/datasets/cub.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

# 360 random pairs, since the pairs of Diffusion Hyperfeatures are not published; see CUBPairsDataset
pipeline = [dict(type='LoadPair'), dict(type='ResizePair', size=512), dict(type='PackPair')]
test_dataloader = dict(dataset=dict(protocol='random', pipeline=pipeline))

_base_ = [
    '../_base_/models/correspondence_sdxl.py',
    '../_base_/datasets/spair_gdf.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/schedule_gdf_10k.py',
]

channels = list(_base_.layers.values())
model = dict(
    backbone=dict(prompt=_base_.prompt, noise='random', dtype='float16', memory_format='contiguous'),
    neck=dict(_delete_=True, type='ConcatNeck', levels=[channels], output_sizes=[128]),
    head=dict(type='ConvDescriptorHead', in_channels=sum(channels)),
    prompt=None,
    match_size=512,
    store_gb=8,
)
pipeline = [dict(type='LoadPair'), dict(type='ResizePair', size=1024), dict(type='PackPair')]
train_dataloader = val_dataloader = test_dataloader = dict(dataset=dict(pipeline=pipeline))

_base_ = [
    '../_base_/models/correspondence_sdxl_sd15_playground.py',
    '../_base_/datasets/spair_gdf.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/schedule_gdf_10k.py',
]

# timestep 51 is where t=50 leads in the PNDM schedule of diffusers, which SD 1.5 has, with its steps_offset of 1
steps = {'sdxl': [50], 'sd15': [51], 'playground-v2': [50]}
backbones = [
    dict(
        member,
        timesteps=steps[member.model],
        prompt=_base_.prompt,
        noise='random',
        dtype='float16',
        memory_format='contiguous',
    )
    for member in _base_.backbones
]
model = dict(
    backbone=dict(backbones=backbones),
    neck=dict(_delete_=True, type='ConcatNeck', levels=[_base_.channels], output_sizes=[128]),
    head=dict(type='ConvDescriptorHead', in_channels=sum(_base_.channels), out_channels=sum(_base_.channels) // 2),
    prompt=None,
    match_size=512,
    store_gb=8,
)
pipeline = [dict(type='LoadPair'), dict(type='PackPair')]  # each network has its own size
train_dataloader = val_dataloader = test_dataloader = dict(dataset=dict(pipeline=pipeline))

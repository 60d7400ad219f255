_base_ = [
    '../_base_/models/correspondence_sd15_legacy.py',
    '../_base_/datasets/spair_gdf.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/schedule_gdf_10k.py',
]

# timestep 51 is where t=50 leads in the PNDM schedule of diffusers, with its steps_offset of 1
channels = list(_base_.layers.values())
model = dict(
    backbone=dict(timesteps=[51], prompt=_base_.prompt, noise='random', dtype='float16', memory_format='contiguous'),
    neck=dict(_delete_=True, type='ConcatNeck', levels=[channels], output_sizes=[128]),
    head=dict(type='ConvDescriptorHead', in_channels=sum(channels)),
    prompt=None,
    match_size=512,
    store_gb=8,
)

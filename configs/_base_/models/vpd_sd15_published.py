# what Generic Diffusion Feature reports as VPD with a frozen UNet, see ../../segmentation/README.md
_base_ = './diffusion_upernet.py'

levels = [  # coarse -> fine
    {'up-level0-repeat1-res-out': 1280},  # stride 64
    {'up-level1-repeat1-vit-out': 1280},  # stride 32
    {'up-level2-repeat1-vit-out': 640},  # stride 16
]
channels = [list(level.values()) for level in levels]
timesteps = [51]  # where t=50 leads in the PNDM schedule of diffusers, with its steps_offset of 1
model = dict(
    data_preprocessor=dict(seg_pad_val=1),
    backbone=dict(
        model='sd15',
        layers=[name for level in levels for name in level],
        channels=[c for level in channels for c in level],
        timesteps=timesteps,
        noise='random',
        input_size=512,
        memory_format='contiguous',
        dtype='float32',  # in which the released code keeps the UNet when it tunes prompts
        # in the place of the prompt: noise of its shape (335 tokens name the 150 classes), to which no gradient comes
        conditioner=dict(type='LearnedPrompts', num_prompts=335, dim=768, trainable=False),
    ),
    neck=dict(_delete_=True, type='ConcatNeck', levels=channels, order='coarse-to-fine'),
    decode_head=dict(in_channels=[sum(level) for level in channels], in_index=[0, 1, 2], pool_scales=(1, 2, 3)),
    auxiliary_head=dict(in_channels=sum(channels[1]), channels=512),
)

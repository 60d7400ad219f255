# VPD (arXiv 2303.02153): the whole UNet is trained, reads the clean latent and attends to the names of the classes; the
# attention to them joins the features
_base_ = './diffusion_upernet.py'

num_classes = 150
levels = [
    {'up-level3-repeat2-vit-out': 320},  # stride 8
    {'up-level2-repeat1-vit-out': 640, 'attn-16': num_classes},
    {'up-level1-repeat1-vit-out': 1280, 'attn-32': num_classes},
    {'up-level0-repeat1-res-out': 1280},  # stride 64
]
channels = [list(level.values()) for level in levels]
model = dict(
    backbone=dict(
        model='sd15',
        layers=[name for level in levels for name in level],
        channels=[c for level in channels for c in level],
        timesteps=[1],
        trajectory='clean',
        vae_sample='mode',
        scale_latent=False,
        attention_maps=['up_cross', 'down_cross'],
        attention_mode='average',
        conditioner=dict(type='TextAdapter', model='sd15', dataset='ADE20KDataset'),
        frozen=False,
        gradient_checkpointing=True,
        dtype='float32',
    ),
    neck=dict(
        _delete_=True,
        type='NeckSequence',
        necks=[
            dict(type='ConcatNeck', levels=channels),
            dict(type='FPN', in_channels=[sum(level) for level in channels], out_channels=256, num_outs=4),
        ],
    ),
    decode_head=dict(
        _delete_=True,
        type='FPNHead',
        in_channels=[256, 256, 256, 256],
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=256,
        dropout_ratio=0.1,
        num_classes=num_classes,
        norm_cfg=_base_.norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    auxiliary_head=None,
)

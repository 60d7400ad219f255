# UPerHead and an auxiliary head, as in Generic Diffusion Feature, for images of 64 pixels
_base_ = './_base_.py'

num_classes = 8
model = dict(
    decode_head=dict(
        _delete_=True,
        type='UPerHead',
        in_index=[0, 1, 2],
        pool_scales=(1, 2, 3),
        channels=64,
        dropout_ratio=0.1,
        num_classes=num_classes,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=[
            dict(type='CrossEntropyLoss', loss_name='loss_ce', loss_weight=1.0),
            dict(type='LovaszLoss', loss_name='loss_lovasz', loss_weight=1.0, reduction='none'),
        ],
    ),
    auxiliary_head=dict(
        type='FCNHead',
        in_index=1,
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=num_classes,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_name='loss_ce_aux', loss_weight=0.4),
    ),
)

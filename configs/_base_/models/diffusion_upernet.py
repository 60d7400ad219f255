# UPerHead on the levels of an AggregationNeck; the models that inherit this say which activations form them
data_preprocessor = dict(
    type='SegDataPreProcessor',
    mean=[127.5, 127.5, 127.5],  # images in [-1, 1], as the VAE expects them
    std=[127.5, 127.5, 127.5],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255,
)
norm_cfg = dict(type='BN')  # on several devices, set sync_bn='torch'
model = dict(
    type='EncoderDecoder',
    data_preprocessor=data_preprocessor,
    backbone=dict(type='DiffusionBackbone'),
    neck=dict(type='AggregationNeck', out_channels=512),
    decode_head=dict(
        type='UPerHead',
        pool_scales=(1, 2, 3, 6),
        channels=512,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=[
            dict(type='CrossEntropyLoss', loss_name='loss_ce', loss_weight=1.0),
            dict(type='LovaszLoss', loss_name='loss_lovasz', loss_weight=1.0, reduction='none'),
        ],
    ),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=512,
        in_index=1,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.4),
    ),
    train_cfg={},
    test_cfg=dict(mode='whole'),
)

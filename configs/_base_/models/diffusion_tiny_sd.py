# one level of four activations of demo/tiny-sd, as Diffusion Hyperfeatures mixes them, and a small head
layers = {
    'up-level2-repeat0-vit-block0-cross-q': 64,  # stride 8
    'up-level2-repeat1-vit-out': 64,  # stride 8
    'up-level2-upsampler-out': 64,  # stride 4
    'up-level3-repeat0-res-out': 48,  # stride 4
}
timesteps = [50, 150, 300]
num_classes = 8
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[127.5, 127.5, 127.5],
        std=[127.5, 127.5, 127.5],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(64, 64),
    ),
    backbone=dict(
        type='DiffusionBackbone',
        model='{{ fileDirname }}/../../../demo/tiny-sd',
        layers=list(layers),
        channels=list(layers.values()),
        timesteps=timesteps,
    ),
    neck=dict(
        type='AggregationNeck',
        levels=[list(layers.values())],
        timesteps=len(timesteps),
        out_channels=128,
        layer_names=[list(layers)],
        timestep_names=timesteps,
    ),
    decode_head=dict(
        type='FCNHead',
        in_channels=128,
        in_index=0,
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=num_classes,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    train_cfg={},
    test_cfg=dict(mode='whole'),
)

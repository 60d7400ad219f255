# mmseg's own Mask2Former, its ResNet replaced; needs mmdet and an mmcv with compiled operators
_base_ = 'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'

custom_imports = dict(imports=['diffseg', 'mmdet.models'], allow_failed_imports=False)
levels = [
    {'up-level1-repeat0-vit-block0-cross-q': 640, 'up-level1-repeat0-vit-block0-out': 640},
    {'up-level0-repeat0-vit-block5-out': 1280, 'up-level0-repeat0-vit-block7-out': 1280},
]
model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        _delete_=True,
        type='DiffusionBackbone',
        model='sdxl',
        layers=[name for level in levels for name in level],
        channels=[channels for level in levels for channels in level.values()],
        timesteps=[50],
        input_size=1024,
        prompt='a highly realistic photo of the real world. '
        'It can be an indoor scene, or an outdoor scene, or a photo of nature. high quality.',
    ),
    neck=dict(  # two levels, and of these a pyramid of four
        type='NeckSequence',
        necks=[
            dict(
                type='AggregationNeck',
                levels=[list(level.values()) for level in levels],
                timesteps=1,
                out_channels=512,
            ),
            dict(type='FPN', in_channels=[512, 512], out_channels=256, num_outs=4),
        ],
    ),
    decode_head=dict(in_channels=[256, 256, 256, 256], strides=[8, 16, 32, 64]),  # pixels of the crop
)

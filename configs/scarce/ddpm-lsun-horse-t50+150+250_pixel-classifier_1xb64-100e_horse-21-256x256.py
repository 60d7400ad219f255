# DDPM of "Label-Efficient Semantic Segmentation with Diffusion Models" (arXiv 2112.03126): output blocks 5, 6, 7, 8 and
# 12 of an unconditional model at three timesteps, with one noise for all pictures. The channels are those published, in
# another order (block by block, not timestep by timestep), which makes no difference to networks that are yet to learn.
_base_ = [
    '../_base_/datasets/scarce_256.py',
    '../_base_/pixel_classifier_runtime.py',
    '../_base_/schedules/schedule_pixel_classifier.py',
]

layers = {'adm-5': 1024, 'adm-6': 512, 'adm-7': 512, 'adm-8': 512, 'adm-12': 256}
timesteps = [50, 150, 250]
category = dict(category='horse_21', data_root='data/horse_21')
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[127.5, 127.5, 127.5],
        std=[127.5, 127.5, 127.5],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size_divisor=1,
    ),
    backbone=dict(
        type='DiffusionBackbone',
        model='ddpm-lsun-horse',
        layers=list(layers),
        channels=list(layers.values()),
        timesteps=timesteps,
    ),
    decode_head=dict(
        type='PixelClassifierHead',
        in_channels=[len(timesteps) * channels for channels in layers.values()],
        num_classes=21,
        output_size=256,
    ),
    train_cfg={},
    test_cfg=dict(mode='whole'),
)
train_dataloader = dict(dataset=category)
test_dataloader = dict(dataset=category)

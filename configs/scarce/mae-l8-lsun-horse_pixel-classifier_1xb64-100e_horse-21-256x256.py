# MAE as in "Label-Efficient Semantic Segmentation with Diffusion Models" (arXiv 2112.03126): the outputs of the last
# twelve of the 24 blocks of a ViT-L/8 that was trained on LSUN
_base_ = './ddpm-lsun-horse-t50+150+250_pixel-classifier_1xb64-100e_horse-21-256x256.py'

layers = list(range(13, 25))
model = dict(
    backbone=dict(
        _delete_=True,
        type='VisionBackbone',
        model='mae-l8-lsun-horse',
        layers=layers,
        channels=[1024] * len(layers),
        layernorm=False,
    ),
    decode_head=dict(in_channels=[1024] * len(layers)),
)

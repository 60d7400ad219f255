# SwAVw2 as in "Label-Efficient Semantic Segmentation with Diffusion Models" (arXiv 2112.03126): what goes into every
# other block of each stage of a ResNet-50 of twice the width that was trained on LSUN,
# swav_w2_checkpoints/lsun_horse.pth of yandex-research/ddpm-segmentation
_base_ = './ddpm-lsun-horse-t50+150+250_pixel-classifier_1xb64-100e_horse-21-256x256.py'

layers = {
    'layer1.0': 128,  # stride 4
    'layer1.2': 512,  # stride 4
    'layer2.0': 512,  # stride 4
    'layer2.2': 1024,  # stride 8
    'layer3.0': 1024,  # stride 8
    'layer3.2': 2048,  # stride 16
    'layer3.4': 2048,  # stride 16
    'layer4.0': 2048,  # stride 16
    'layer4.2': 4096,  # stride 32
}
model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNetBackbone',
        model='models/swav-w2-lsun-horse.pth',
        width=2,
        layers=list(layers),
        channels=list(layers.values()),
    ),
    decode_head=dict(in_channels=list(layers.values())),
)

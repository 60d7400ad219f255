# what the released code does for SD 1.5: its four layers at timestep 51, for the 50 that is asked for; levels coarse
# -> fine, so that the head pools the finest map and predicts at the size of the coarsest; no learned aggregation,
# since its residual blocks cannot learn; fresh noise for every image; padded labels as class 1; UPerHead with
# cross-entropy and Lovasz loss, and an auxiliary FCN. Unlike released: the model of the demo for SD 1.5, in float32,
# without a prompt; whole images of 64 pixels, flipped but neither scaled, cropped, distorted nor padded, and tested
# without windows; heads of 64 channels, not 512; the constants for each channel that the residual blocks learn are
# left out; AdamW with 2e-3 and weight decay 1e-2, falling linearly to 0 in 300 iterations of 8 images, not with
# 1.6e-4 and 1e-3, falling to 1e-4 in 80,000 of 2.
_base_ = './_upernet.py'

levels = [
    {'up-level1-repeat1-vit-block0-cross-q': 96, 'up-level1-repeat2-res-out': 96},  # stride 16
    {'up-level2-repeat1-vit-block0-cross-q': 64},  # stride 8
    {'up-level3-repeat0-vit-block0-self-k': 48},  # stride 4
]
model = dict(
    data_preprocessor=dict(seg_pad_val=1),
    backbone=dict(
        layers=[name for level in levels for name in level],
        channels=[channels for level in levels for channels in level.values()],
        timesteps=[51],
        noise='random',
        dtype='float32',
        memory_format='contiguous',
        cache=None,
    ),
    neck=dict(
        _delete_=True, type='ConcatNeck', levels=[list(level.values()) for level in levels], order='coarse-to-fine'
    ),
    decode_head=dict(in_channels=[sum(level.values()) for level in levels]),
    auxiliary_head=dict(in_channels=sum(levels[1].values())),
)

# as released for SD 1.5 but for the sizes, the learning rate and the number of iterations: levels coarse -> fine, so
# that the head pools the finest map and predicts at the size of the coarsest; no learned aggregation, since its
# residual blocks cannot learn; fresh noise for every image; and timestep 51 for the 50 that is asked for
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
        cache=None,
    ),
    neck=dict(
        _delete_=True, type='ConcatNeck', levels=[list(level.values()) for level in levels], order='coarse-to-fine'
    ),
    decode_head=dict(in_channels=[sum(level.values()) for level in levels]),
    auxiliary_head=dict(in_channels=sum(levels[1].values())),
)

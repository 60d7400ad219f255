_base_ = [
    '../_base_/models/diffusion_sd15_dinov2_b.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_adamw_80k.py',
]

backbones = [dict(_base_.backbones[0], prompt=_base_.prompt), _base_.backbones[1]]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(backbones=backbones),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(341, 341)),
)
# DINOv2 has 37 x 37 cells whatever the window. That keeps the order of levels in windows of 512 x 512 pixels, which
# images that are made smaller have not.
scales = [dict(type='Resize', scale=(int(r * 2048), int(r * 512)), keep_ratio=True) for r in (1.0, 1.25, 1.5, 1.75)]
tta_pipeline = [
    _base_.tta_pipeline[0],
    dict(type='TestTimeAug', transforms=[scales, *_base_.tta_pipeline[1].transforms[1:]]),
]

# any mmseg neck: FPN on the four maps as they are, and the head of Semantic FPN
_base_ = './sdxl-t50_agg-upernet_1xb2-80k_ade20k-512x512.py'

channels = _base_.model.backbone.channels
model = dict(
    neck=dict(_delete_=True, type='FPN', in_channels=channels, out_channels=256, num_outs=len(channels)),
    decode_head=dict(
        _delete_=True,
        type='FPNHead',
        in_channels=[256, 256, 256, 256],
        in_index=[0, 1, 2, 3],
        feature_strides=[16, 16, 32, 32],
        channels=128,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=_base_.norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    auxiliary_head=None,
)

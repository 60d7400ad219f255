# any mmseg head: SegFormer's
_base_ = './sdxl-t50_agg-upernet_1xb2-80k_ade20k-512x512.py'

model = dict(
    decode_head=dict(
        _delete_=True,
        type='SegformerHead',
        in_channels=[512, 512],
        in_index=[0, 1],
        channels=256,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=_base_.norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    auxiliary_head=None,
)

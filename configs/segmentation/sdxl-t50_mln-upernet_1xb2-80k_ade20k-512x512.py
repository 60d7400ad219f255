# any mmseg neck: MultiLevelNeck makes a pyramid of four levels, as mmseg has it for ViT
_base_ = './sdxl-t50_agg-upernet_1xb2-80k_ade20k-512x512.py'

model = dict(
    neck=dict(
        _delete_=True,
        type='MultiLevelNeck',
        in_channels=_base_.model.backbone.channels,
        out_channels=512,
        scales=[2, 1, 1, 0.5],  # strides 16, 16, 32, 32 -> 8, 16, 32, 64
    ),
    decode_head=dict(in_channels=[512, 512, 512, 512], in_index=[0, 1, 2, 3]),
    auxiliary_head=dict(in_index=2),
)

# DiTF and DINOv2, each of unit length, concatenated
_base_ = './flux-dev-t260_ditf-mod-discard_1xb1-zero-shot_spair-640x640.py'

ditf = _base_.model.backbone
dinov2 = dict(type='VisionBackbone', model='dinov2-b', layers=[12], channels=[768], layernorm=False, input_size=840)
model = dict(
    backbone=dict(_delete_=True, type='EnsembleBackbone', backbones=[ditf, dinov2]),
    neck=dict(type='ConcatNeck', levels=[[*ditf.channels, *dinov2['channels']]], normalize=True),
)

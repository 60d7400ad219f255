# concatenated, with one 3 x 3 convolution that is trained, as Generic Diffusion Feature has it
_base_ = './twelve-layers_clean_agg.py'

levels = [list(_base_.layers.values())]
model = dict(
    neck=dict(_delete_=True, type='ConcatNeck', levels=levels),
    head=dict(type='ConvDescriptorHead', in_channels=sum(levels[0]), out_channels=64),
)

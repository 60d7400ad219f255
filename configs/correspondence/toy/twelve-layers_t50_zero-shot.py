# the second convolutions of all residual blocks on the way up, concatenated as they are
_base_ = './_zero-shot.py'

model = dict(neck=dict(type='ConcatNeck', levels=[list(_base_.layers.values())]))

# twice the size, bilinearly: what `upsampling` has to beat
_base_ = './_base_.py'

model = dict(neck=dict(enlarge=[2]))

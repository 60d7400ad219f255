# twice the size, bilinearly: what `upsampling` has to beat
_base_ = './twelve-layers_clean_agg.py'

model = dict(neck=dict(enlarge=[2]))

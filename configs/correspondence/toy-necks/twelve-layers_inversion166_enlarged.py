# twice the size, bilinearly
_base_ = './twelve-layers_inversion166_agg.py'

model = dict(neck=dict(enlarge=[2]))

_base_ = './twelve-layers_clean_agg.py'

model = dict(backbone=dict(output_image=True), neck=dict(type='UpsamplingNeck'))

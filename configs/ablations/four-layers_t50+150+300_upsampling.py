_base_ = './_base_.py'

model = dict(backbone=dict(output_image=True), neck=dict(type='UpsamplingNeck'))

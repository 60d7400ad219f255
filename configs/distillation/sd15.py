_base_ = ['./_sd.py', '../_base_/datasets/images_512.py']

model = dict(backbone=dict(model='sd15'))

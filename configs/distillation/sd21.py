_base_ = ['./_sd.py', '../_base_/datasets/images_768.py']

model = dict(backbone=dict(model='sd21'))

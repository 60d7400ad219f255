# the thirty labelled toy pictures, of which larger batches of pixels are trained on than as published, to save time
_base_ = '../../scarce/tiny-sd-t50_pixel-classifier_1xb64-100e_toy-64x64.py'

model = dict(backbone=dict(noise='random'), decode_head=dict(num_pixels=512))
train_cfg = dict(max_epochs=5)

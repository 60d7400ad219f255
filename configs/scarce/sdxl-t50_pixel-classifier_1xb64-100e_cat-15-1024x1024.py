_base_ = './sdxl-t50_pixel-classifier_1xb64-100e_horse-21-1024x1024.py'

category = dict(category='cat_15', data_root='data/cat_15')
model = dict(backbone=dict(prompt='a photo of a cat'), decode_head=dict(num_classes=15))
train_dataloader = dict(dataset=category)
test_dataloader = dict(dataset=category)

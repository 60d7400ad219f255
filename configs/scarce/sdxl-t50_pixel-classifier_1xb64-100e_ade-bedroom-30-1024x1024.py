_base_ = './sdxl-t50_pixel-classifier_1xb64-100e_horse-21-1024x1024.py'

category = dict(category='ade_bedroom_30', data_root='data/ade_bedroom_30')
model = dict(backbone=dict(prompt='a photo of a bedroom'), decode_head=dict(num_classes=30))
train_dataloader = dict(dataset=category)
test_dataloader = dict(dataset=category)

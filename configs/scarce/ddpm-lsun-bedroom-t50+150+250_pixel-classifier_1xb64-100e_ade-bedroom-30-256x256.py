_base_ = './ddpm-lsun-horse-t50+150+250_pixel-classifier_1xb64-100e_horse-21-256x256.py'

category = dict(category='ade_bedroom_30', data_root='data/ade_bedroom_30')
model = dict(backbone=dict(model='ddpm-lsun-bedroom'), decode_head=dict(num_classes=30))
train_dataloader = dict(dataset=category)
test_dataloader = dict(dataset=category)

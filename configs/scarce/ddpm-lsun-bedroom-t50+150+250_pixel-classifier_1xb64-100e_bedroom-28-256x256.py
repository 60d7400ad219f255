_base_ = './ddpm-lsun-horse-t50+150+250_pixel-classifier_1xb64-100e_horse-21-256x256.py'

category = dict(category='bedroom_28', data_root='data/bedroom_28')
model = dict(backbone=dict(model='ddpm-lsun-bedroom'), decode_head=dict(num_classes=29))
train_dataloader = dict(dataset=category)
test_dataloader = dict(dataset=category)

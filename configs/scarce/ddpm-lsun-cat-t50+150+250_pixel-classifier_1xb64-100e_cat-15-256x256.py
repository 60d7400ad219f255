_base_ = './ddpm-lsun-horse-t50+150+250_pixel-classifier_1xb64-100e_horse-21-256x256.py'

category = dict(category='cat_15', data_root='data/cat_15')
model = dict(backbone=dict(model='ddpm-lsun-cat'), decode_head=dict(num_classes=15))
train_dataloader = dict(dataset=category)
test_dataloader = dict(dataset=category)

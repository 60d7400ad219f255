_base_ = './ddpm-lsun-horse-t50+150+250_pixel-classifier_1xb64-100e_horse-21-256x256.py'

category = dict(category='ffhq_34', data_root='data/ffhq_34')
model = dict(backbone=dict(model='ddpm-ffhq'), decode_head=dict(num_classes=34))
train_dataloader = dict(dataset=category)
test_dataloader = dict(dataset=category)

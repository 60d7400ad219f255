_base_ = './sdxl-t50_pixel-classifier_1xb64-100e_horse-21-1024x1024.py'

category = dict(category='ffhq_34', data_root='data/ffhq_34')
model = dict(backbone=dict(prompt='a photo of a face'), decode_head=dict(num_classes=34))
train_dataloader = dict(dataset=category)
test_dataloader = dict(dataset=category)

_base_ = './sdxl-t50_pixel-classifier_1xb64-100e_horse-21-1024x1024.py'

category = dict(category='celeba_19', data_root='data/celeba_19')
model = dict(backbone=dict(prompt='a photo of a face'), decode_head=dict(num_classes=19))
train_dataloader = dict(dataset=category)
test_dataloader = dict(dataset=category)
tta_model = dict(swapped_by_flip=[(6, 14), (7, 15), (8, 16)])  # left and right eyebrow, ear, eye

# the classifiers that label the images of DatasetDDPM (arXiv 2112.03126, section 4): trained on annotated images of the
# model itself, data/horse_21/ddpm, see tools/apply/dataset_ddpm.py
_base_ = './ddpm-lsun-horse-t50+150+250_pixel-classifier_1xb64-100e_horse-21-256x256.py'

train_dataloader = dict(dataset=dict(split='ddpm'))

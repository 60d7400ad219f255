# CleanDIFT (arXiv 2412.03439) in the place of DIFT's model, without noise
_base_ = './sd21-t261_dift_1xb1-zero-shot_spair-768x768.py'

model = dict(backbone=dict(model='cleandift-sd21', trajectory='clean', ensemble=1))

# as the released code does it: other noise in every run, and its own convention of coordinates
_base_ = './sd21-t0_dift_1xb1-zero-shot_hpatches-768x768.py'

model = dict(backbone=dict(noise='random', dtype='float32', memory_format='contiguous'), convention='published')

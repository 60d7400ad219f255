# CleanDIFT (arXiv 2412.03439) on Stable Diffusion 1.5, without noise, at the size that it was trained for
_base_ = [
    '../_base_/models/correspondence_dift.py',
    '../_base_/datasets/spair_test.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

model = dict(backbone=dict(model='cleandift-sd15', trajectory='clean', ensemble=1))

# as in the released code: a warm-up of five times the length of the run
_base_ = './tiny-sd.py'

param_scheduler = [dict(type='LinearLR', start_factor=1 / 200, end=200, by_epoch=False)]

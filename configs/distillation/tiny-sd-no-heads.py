_base_ = './tiny-sd.py'

model = dict(heads=None)

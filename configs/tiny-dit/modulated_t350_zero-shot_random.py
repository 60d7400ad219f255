_base_ = './_zero-shot.py'

model = dict(backbone=dict(random=['transformer']))

_base_ = './agg-fcn_1xb8-300_toy-64x64.py'

model = dict(backbone=dict(random=['transformer']))

# what the ablations share: data, head and schedule of the demo, activations kept on disk
_base_ = '../scarce/tiny-sd-t50+150+300_agg-fcn_1xb8-300_toy-64x64.py'

model = dict(backbone=dict(cache='work_dirs/features'))

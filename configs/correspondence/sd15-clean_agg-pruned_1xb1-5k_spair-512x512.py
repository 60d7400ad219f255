# Diffusion Hyperfeatures pruned to one layer and timestep. Which they were is not published;
# tools/convert/prune.py finds those that matter most to weights of yours.
_base_ = [
    '../_base_/models/correspondence_dhf_clean.py',
    '../_base_/datasets/spair.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/schedule_dhf_5k.py',
]

layer, channels = 'up-level1-repeat1-res-increment', 1280
model = dict(
    backbone=dict(layers=[layer], channels=[channels]),
    neck=dict(levels=[[channels]], layer_names=[[layer]]),
)

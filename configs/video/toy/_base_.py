# What the studies on toy clips share: frames at their own size, 96 x 160, of 24 x 40 cells. The clips:
#   python tools/toy/make_davis.py data
#   python tools/toy/make_davis.py data --jhmdb
_base_ = '../../_base_/video_runtime.py'

model = dict(
    type='LabelPropagator',
    backbone=dict(type='DiffusionBackbone', model='{{ fileDirname }}/../../../demo/tiny-sd'),
    topk=15,
    radius=8,
    temperature=0.1,
    previous_frames=28,
    batch_size=8,
)

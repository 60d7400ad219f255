# DiTF's third row: without the channel that stands out, by tools/analysis/channel_magnitudes.py
_base_ = './_zero-shot.py'

model = dict(backbone=dict(discard=[133]))

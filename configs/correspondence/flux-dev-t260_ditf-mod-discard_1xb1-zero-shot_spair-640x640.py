# without the two channels of massive activations
_base_ = './flux-dev-t260_ditf-mod_1xb1-zero-shot_spair-640x640.py'

model = dict(backbone=dict(discard=[154, 1446]))

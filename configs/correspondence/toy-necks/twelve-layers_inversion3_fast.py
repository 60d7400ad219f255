# the mixing weights learn thirty times as fast, so that a hundred iterations can move them
_base_ = './twelve-layers_inversion3_agg.py'

optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(mixing_weights=dict(lr_mult=30))))

# the mixing weights stay equal; the bottlenecks are trained
_base_ = './twelve-layers_inversion11_agg.py'

optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(mixing_weights=dict(lr_mult=0))))

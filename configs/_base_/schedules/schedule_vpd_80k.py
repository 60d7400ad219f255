# the schedule of VPD (arXiv 2303.02153) and Meta Prompts (arXiv 2312.14733): linear decay from the first iteration, a
# warm-up on top of it, and a slow UNet. Among the released keys "norm" precedes "unet", which is as long: the norms
# that the released network calls so, those of its transformers, learn at the full rate without decay. Those of its
# residual blocks, which diffusers alone calls norms, learn as the rest of the UNet does.
_base_ = 'mmseg::_base_/schedules/schedule_80k.py'

optimizer = dict(_delete_=True, type='AdamW', lr=8e-5, weight_decay=1e-3)
optim_wrapper = dict(
    optimizer=optimizer,
    paramwise_cfg=dict(
        custom_keys={
            'resnets': dict(lr_mult=0.1),
            'conv_norm_out': dict(lr_mult=0.1),
            'norm': dict(decay_mult=0.0),
            'net': dict(lr_mult=0.1),  # of `extractor.network`; longer keys go before it, "norm" too
        }
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=1500, by_epoch=False),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=0, end=80000, by_epoch=False),
]

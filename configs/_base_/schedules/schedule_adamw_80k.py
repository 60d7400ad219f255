# the schedule of Generic Diffusion Feature (arXiv 2410.03558): no warm-up, PolyLR from 1.6e-4 to 1e-4
_base_ = 'mmseg::_base_/schedules/schedule_80k.py'

optimizer = dict(_delete_=True, type='AdamW', lr=1.6e-4, weight_decay=1e-3)
optim_wrapper = dict(optimizer=optimizer)

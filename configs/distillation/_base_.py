# CleanDIFT (arXiv 2412.03439): 400 steps of Adam at a constant learning rate. The released code warms it up over 2000
# steps, so that a run of 400 ends at a fifth of it.
#   python tools/distill.py configs/distillation/CONFIG.py --images FOLDER
_base_ = '../_base_/default_runtime.py'

model = dict(
    type='CleanDistiller',
    data_preprocessor=dict(type='ImgDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True),
    backbone=dict(type='DiffusionBackbone', frozen=False),
    heads=dict(depth=3),
    timestep=261,
)
val_evaluator = dict(type='AgreementMetric')
test_evaluator = val_evaluator
max_iters = 400
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=100)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='Adam', lr=1e-5),
    paramwise_cfg=dict(custom_keys=dict(learned_timestep=dict(lr_mult=100))),  # one timestep in a step, at most
)
param_scheduler = []
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=10, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=100, max_keep_ckpts=2),
)
custom_hooks = [*_base_.custom_hooks, dict(type='DistillationExportHook')]

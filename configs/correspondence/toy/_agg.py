# the aggregation network of Diffusion Hyperfeatures, trained within species
_base_ = './_base_.py'

model = dict(
    backbone=dict(cache='work_dirs/features'),
    neck=dict(
        type='AggregationNeck',
        levels=[list(_base_.layers.values())],
        timesteps=1,
        out_channels=128,
        num_groups=8,
        layer_names=[list(_base_.layers)],
    ),
)
max_iters = 200
train_dataloader = dict(batch_size=4)
val_dataloader = val_evaluator = None
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0))
param_scheduler = []
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=max_iters),
)

# the schedule of Generic Diffusion Feature (arXiv 2410.03558) for correspondence: twice 5000 pairs, a constant rate; of
# the checkpoints the best is taken, by either metric. The released code validates 19 times, at steps 500 to 9500, and
# what it learns afterwards is neither scored nor saved.
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=5e-4, weight_decay=1e-2))
param_scheduler = []
train_cfg = dict(type='IterBasedTrainLoop', max_iters=9500, val_interval=500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    checkpoint=dict(
        type='CheckpointHook',
        by_epoch=False,
        interval=500,
        save_best=['PCK@0.1-img/point', 'PCK@0.1-bbox/point'],
        rule='greater',
        max_keep_ckpts=1,
    ),
)

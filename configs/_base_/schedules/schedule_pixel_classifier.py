# DatasetDDPM's: Adam at a constant rate, mini-batches of 64 pixels, at most 100 epochs over the pixels of all pictures;
# every network stops by itself
train_cfg = dict(type='PixelClassifierLoop', max_epochs=100)
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='Adam', lr=1e-3))
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1000, log_metric_by_epoch=True),
    checkpoint=dict(type='CheckpointHook', by_epoch=True, interval=1, max_keep_ckpts=2),
    visualization=dict(type='SegVisualizationHook', interval=1),
)

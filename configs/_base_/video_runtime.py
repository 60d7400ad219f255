_base_ = './default_runtime.py'

custom_hooks = [
    *_base_.custom_hooks,
    dict(type='ResultFileHook'),  # result files of metrics go into the work dir
    dict(type='VideoResultHook'),  # predictions as indexed PNGs, overlay videos and strips
]
default_hooks = dict(logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False))  # a line for each video
test_cfg = dict(type='TestLoop')

_base_ = './default_runtime.py'

custom_hooks = [
    *_base_.custom_hooks,
    dict(type='ResultFileHook'),  # pck.json goes into the work dir
    dict(type='ResumableTestHook'),  # a test that was interrupted goes on
]

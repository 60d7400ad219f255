_base_ = './default_runtime.py'

custom_hooks = [*_base_.custom_hooks, dict(type='ResultFileHook')]  # result files go into the work dir

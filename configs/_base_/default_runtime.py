_base_ = 'mmseg::_base_/default_runtime.py'

custom_imports = dict(imports=['diffseg'])
randomness = dict(seed=0)
custom_hooks = [
    dict(type='IterationSeedHook'),  # resuming continues exactly
    dict(type='CheckpointFallbackHook'),
    dict(type='SelectionGuardHook'),  # no checkpoint is chosen by PCK on a test split
]

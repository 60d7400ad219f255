_base_ = 'mmseg::_base_/default_runtime.py'

custom_imports = dict(imports=['diffseg'])
randomness = dict(seed=0)
custom_hooks = [dict(type='IterationSeedHook'), dict(type='CheckpointFallbackHook')]  # resuming continues exactly

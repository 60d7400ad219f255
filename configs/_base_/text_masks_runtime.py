_base_ = './default_runtime.py'

custom_hooks = [
    *_base_.custom_hooks,
    dict(type='ResultFileHook'),  # text_masks.json goes into the work dir
]
tta_model = dict(type='VoteTTAModel')  # the mean of shares

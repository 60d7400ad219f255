# concatenated as they are; nothing is trained
_base_ = './twelve-layers_clean_agg.py'

model = dict(neck=dict(_delete_=True, type='ConcatNeck', levels=[list(_base_.layers.values())]))
train_dataloader = train_cfg = optim_wrapper = param_scheduler = None

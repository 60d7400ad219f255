# not trained; every seed of tools/run_splits.py draws other noise
_base_ = './_base_.py'

model = dict(backbone=dict(noise='random'))
train_dataloader = val_dataloader = val_evaluator = None

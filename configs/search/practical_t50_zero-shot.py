# the choice that a selection is compared with
_base_ = './pairs.py'

train_dataloader = val_dataloader = val_evaluator = None

# SPair-71k's test split alone, for models that are not trained
_base_ = './spair.py'

train_dataloader = val_dataloader = val_evaluator = None

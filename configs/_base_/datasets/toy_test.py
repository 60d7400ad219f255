# the demo's test pictures alone, for models that are not trained
_base_ = './toy.py'

train_dataloader = val_dataloader = val_evaluator = None
test_dataloader = dict(batch_size=1)
test_evaluator = dict(type='TextMaskIoUMetric', out_file='text_masks.json')

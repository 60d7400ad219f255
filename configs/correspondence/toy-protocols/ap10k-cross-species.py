_base_ = './ap10k.py'

test_dataloader = dict(dataset=dict(protocol='cross-species'))

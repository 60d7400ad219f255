_base_ = './sd21-t261_dift_1xb1-zero-shot_ap10k-768x768.py'

model = dict(prompt=None)  # there is no category
test_dataloader = dict(dataset=dict(protocol='cross-family'))

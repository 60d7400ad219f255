_base_ = './dinov3-b_tokens_1xb1-zero-shot_ap10k-960x960.py'

test_dataloader = dict(dataset=dict(protocol='cross-species'))

_base_ = './flux-schnell-t500_concept-attention_1xb1-zero-shot_ade20k-1024x1024.py'

model = dict(space='attention')

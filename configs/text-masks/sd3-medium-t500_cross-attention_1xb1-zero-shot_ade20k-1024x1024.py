# block 9, whose attention from image to text is the best aligned in Seg4Diff (arXiv 2509.18096)
_base_ = './sd3-medium-t500_concept-attention_1xb1-zero-shot_ade20k-1024x1024.py'

model = dict(space='attention', blocks=[9])

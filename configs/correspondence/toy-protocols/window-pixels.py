# the refinement within a window of pixels of the upsampled map
_base_ = './ap10k.py'

model = dict(window=11, temperature=0.04)

# as the released code encodes real images: the third of four steps, whose share of noise without a shift is 0.5, and
# the last four blocks with a stream for text
_base_ = './text_masks.py'

model = dict(
    model='flux-schnell',
    blocks=[15, 16, 17, 18],
    timesteps=[0.5],
    zero_pooled=True,
    max_sequence_length=256,
)

# as the released code of Generic Diffusion Feature (arXiv 2410.03558): fresh noise for every picture, and maps that are
# repeated to the size of the largest one of their model, 64 x 64, before they are interpolated; that of Playground is
# its only one
_base_ = './sdxl+sd15+playground-v2_pixel-classifier_1xb64-100e_horse-21-1024x1024.py'

maps = {'sdxl': 'nearest', 'sd15': 'nearest', 'playground-v2': 'bilinear'}
model = dict(
    backbone=dict(
        backbones=[
            dict(member, noise='random', dtype='float16', memory_format='contiguous') for member in _base_.backbones
        ]
    ),
    decode_head=dict(resize=[maps[member.model] for member in _base_.backbones for _ in member.channels]),
)

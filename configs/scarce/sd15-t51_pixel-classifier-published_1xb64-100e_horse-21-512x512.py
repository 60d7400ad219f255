# as the released code of Generic Diffusion Feature (arXiv 2410.03558): fresh noise for every picture, and maps that are
# repeated to the size of the largest one before they are interpolated
_base_ = './sd15-t51_pixel-classifier_1xb64-100e_horse-21-512x512.py'

model = dict(
    backbone=dict(noise='random', dtype='float16', memory_format='contiguous'), decode_head=dict(resize='nearest')
)

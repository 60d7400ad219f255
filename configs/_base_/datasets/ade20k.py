# ADE20K with mmseg's 512x512 crops; prompt and batch size are those of Generic Diffusion Feature
_base_ = 'mmseg::_base_/datasets/ade20k.py'

prompt = (
    'a highly realistic photo of the real world. '
    'It can be an indoor scene, or an outdoor scene, or a photo of nature. high quality.'
)
train_dataloader = dict(batch_size=2)

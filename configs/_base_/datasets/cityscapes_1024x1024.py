# Cityscapes with mmseg's 1024x1024 crops; the prompt is that of Generic Diffusion Feature
_base_ = 'mmseg::_base_/datasets/cityscapes_1024x1024.py'

prompt = (
    'An urban street scene with multiple lanes, various buildings, traffic lights, cars in the lanes, and pedestrians, '
    'highly realistic.'
)
train_dataloader = dict(batch_size=2)

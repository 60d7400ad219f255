# the UNet's decoder is trained, at a tenth of the learning rate
_base_ = './sd15-t50_agg-upernet_1xb2-80k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        frozen=False,
        trainable=['up_blocks.*'],
        train_noise='random',
        dtype='float32',
        gradient_checkpointing=True,
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'backbone.extractor.network': dict(lr_mult=0.1)}))

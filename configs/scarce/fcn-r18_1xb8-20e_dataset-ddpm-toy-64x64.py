# a small segmentor on generated toy quadrupeds that tools/apply/dataset_ddpm.py labelled
_base_ = './deeplabv3-r101_1xb8-20e_dataset-ddpm-horse-21-256x256.py'

model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(depth=18, base_channels=16, strides=(1, 1, 1, 1), dilations=(1, 1, 2, 4)),  # stride 4
    decode_head=dict(
        _delete_=True,
        type='FCNHead',
        in_channels=128,
        in_index=3,
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=8,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)
labels = dict(type='LoadLabelArray')
test_pipeline = [_base_.load, labels, _base_.pack]
tta_pipeline = [_base_.load, dict(type='TestTimeAug', transforms=[_base_.flips, [labels], [_base_.pack]])]
toy = dict(category='toy', data_root='data/toy', pipeline=test_pipeline)
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=toy)
val_dataloader = dict(num_workers=0, dataset=toy)
test_dataloader = dict(num_workers=0, dataset=toy)

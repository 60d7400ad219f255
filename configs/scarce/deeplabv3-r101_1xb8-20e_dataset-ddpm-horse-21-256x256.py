# the segmentor of DatasetDDPM (arXiv 2112.03126, section 4), trained on generated images that
# tools/apply/dataset_ddpm.py labelled; the checkpoint is chosen on the real training pictures. The published backbone
# has weights from ImageNet, which are downloaded with
# --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=torchvision://resnet101
# What is left to differ is the order of layers behind the pyramid: torchvision projects it by a 1 x 1 convolution,
# drops out and convolves by 3 x 3, mmseg's ASPPHead projects by 3 x 3 and drops out.
_base_ = ['mmseg::_base_/models/deeplabv3_r50-d8.py', '../_base_/scarce_runtime.py']

norm_cfg = dict(type='BN')
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(256, 256)),
    backbone=dict(type='ResNet', depth=101, norm_cfg=norm_cfg),
    decode_head=dict(channels=256, dropout_ratio=0.5, num_classes=21, norm_cfg=norm_cfg),
    auxiliary_head=None,
)
load = dict(type='LoadImageFromFile')
resize = dict(type='Resize', scale=(256, 256), keep_ratio=False)
labels = dict(type='LoadLabelArray', size=256)
pack = dict(type='PackSegInputs')
test_pipeline = [load, resize, labels, pack]
flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0, direction='horizontal')]
tta_pipeline = [load, dict(type='TestTimeAug', transforms=[[resize], flips, [labels], [pack]])]
dataset = dict(type='ScarceDataset', category='horse_21', data_root='data/horse_21', pipeline=test_pipeline)
train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    drop_last=True,
    dataset=dict(split='generated/kept', **dataset),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=2,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(split='real/train', **dataset),
)
test_dataloader = dict(
    batch_size=8,
    num_workers=2,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(split='real/test', **dataset),
)
val_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU'])]
test_evaluator = dict(type='ScarceIoUMetric', iou_metrics=['mIoU'])
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=20, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='Adam', lr=1e-3))
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=100, log_metric_by_epoch=True),
    checkpoint=dict(type='CheckpointHook', by_epoch=True, interval=1, max_keep_ckpts=2, save_best='mIoU'),
    visualization=dict(type='SegVisualizationHook', interval=1),
)

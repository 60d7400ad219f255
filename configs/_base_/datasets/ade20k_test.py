# ADE20K's validation images at the size of their files, for models that are not trained
_base_ = './ade20k.py'

train_dataloader = val_dataloader = val_evaluator = None
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0, direction='horizontal')],
            [dict(type='LoadAnnotations', reduce_zero_label=True)],
            [dict(type='PackSegInputs')],
        ],
    ),
]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_evaluator = dict(type='TextMaskIoUMetric', out_file='text_masks.json')

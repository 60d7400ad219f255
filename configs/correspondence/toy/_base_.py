# What the studies on toy pairs share: matching at 64 x 64 pixels, scored within species and across them. The pairs:
#   python tools/toy/make_data.py data --train 0 --test 0 --pairs 20 --across 5
_base_ = ['../../_base_/datasets/spair_toy.py', '../../_base_/correspondence_runtime.py']

channels = [96, 96, 64, 48]  # of the decoder's levels
layers = {f'up-level{level}-repeat{repeat}-res-increment': channels[level] for level in range(4) for repeat in range(3)}
model = dict(
    type='CorrespondenceModel',
    backbone=dict(
        type='DiffusionBackbone',
        model='{{ fileDirname }}/../../../demo/tiny-sd',
        layers=list(layers),
        channels=list(layers.values()),
        timesteps=[50],
    ),
)
within = dict(type='ToyPairDataset', data_root='data/SPair-toy', split='test', pipeline=_base_.pipeline, test_mode=True)
test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[within, dict(within, data_root='data/SPair-toy-across')],
        ignore_keys=['dataset', 'num_pairs'],
    )
)
metric = dict(type='PCKMetric', thresholds=(0.1,), bases=('bbox',))
test_evaluator = [
    dict(metric, prefix='within', categories=['horse', 'giraffe', 'dog', 'elephant'], out_file='within.json'),
    dict(metric, prefix='across', categories=['*_*'], out_file='across.json'),
]
test_cfg = dict(type='TestLoop')

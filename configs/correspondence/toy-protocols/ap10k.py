# Toy quadrupeds of one species in AP-10K's layout, drawn by
#   python tools/toy/make_data.py data --train 0 --test 0 --ap10k 10
_base_ = '../toy/single-layer_t50_zero-shot.py'

model = dict(backbone=dict(noise='seeded'))
test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ToyAP10KDataset',
        data_root='data/ap-10k-toy',
        split='test',
        protocol='intra-species',
        pipeline=[dict(type='LoadPair'), dict(type='PackPair')],
        test_mode=True,
    )
)
test_evaluator = dict(_delete_=True, type='PCKMetric', thresholds=(0.1,), bases=('bbox',), out_file='pck.json')

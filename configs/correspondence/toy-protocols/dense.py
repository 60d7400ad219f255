# Toy quadrupeds and themselves under a similarity, with a dense flow in TSS's layout, drawn by
#   python tools/toy/make_data.py data --train 0 --test 0 --tss 4
_base_ = './ap10k.py'

test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='TSSDataset',
        data_root='data/TSS-toy',
        split='test',
        pipeline=[dict(type='LoadPair'), dict(type='PackPair')],
        test_mode=True,
    )
)
test_evaluator = dict(thresholds=(0.05,), bases=('img',))

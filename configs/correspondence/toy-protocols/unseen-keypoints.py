# Toy quadrupeds with keypoints that other toy pairs do not have, in SPair-U's layout, drawn by
#   python tools/toy/make_data.py data --train 0 --test 0 --unseen 10
_base_ = './ap10k.py'

test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='SPairUDataset',
        data_root='data/SPair-U-toy',
        split='test',
        pipeline=[dict(type='LoadPair'), dict(type='PackPair')],
        test_mode=True,
    )
)

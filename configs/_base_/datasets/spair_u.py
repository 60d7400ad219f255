# SPair-71k's test pairs with the keypoints of SPair-U at 512 x 512
_base_ = './spair_test.py'

test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='SPairUDataset',
        data_root='data/SPair-U',
        split='test',
        pipeline=_base_.pipeline,
        test_mode=True,
    )
)

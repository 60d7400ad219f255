# What the comparison of necks on toy pairs shares: trained within species on nine of the fourteen keypoints, scored on
# these and on the other five, every third, within species and across them. Half as many channels and iterations as in
# ../toy, since the necks that weigh every position cost more.
_base_ = '../toy/_agg.py'

max_iters = 100
model = dict(neck=dict(out_channels=64))
train_cfg = dict(max_iters=max_iters)
default_hooks = dict(checkpoint=dict(interval=max_iters))

unseen = [1, 4, 7, 10, 13]  # muzzle, withers, tail tip, near front hoof, far hind hoof
seen = [0, 2, 3, 5, 6, 8, 9, 11, 12]
train_dataloader = dict(
    dataset=dict(
        pipeline=[dict(type='LoadPair'), dict(type='SelectKeypointsPair', keypoint_ids=seen), dict(type='PackPair')]
    )
)
metric = dict(type='PCKMetric', thresholds=(0.1,), bases=('bbox',))
within = dict(metric, categories=['horse', 'giraffe', 'dog', 'elephant'])
across = dict(metric, categories=['*_*'])
test_evaluator = [
    dict(within, prefix='seen', keypoint_ids=seen, out_file='seen.json'),
    dict(within, prefix='unseen', keypoint_ids=unseen, out_file='unseen.json'),
    dict(across, prefix='across-seen', keypoint_ids=seen, out_file='across-seen.json'),
    dict(across, prefix='across-unseen', keypoint_ids=unseen, out_file='across-unseen.json'),
]

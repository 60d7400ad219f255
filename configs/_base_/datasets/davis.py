# DAVIS-2017 (val, 30 videos), as DIFT and DINO read it: the shorter side 480 pixels, the longer one a multiple of 32
test_dataloader = dict(
    batch_size=1,  # of videos; of frames it is the model's
    num_workers=0,  # frames are read by the model, one after the other
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='pseudo_collate'),
    dataset=dict(
        type='DAVISDataset',
        data_root='data/DAVIS',
        split='val',
        pipeline=[dict(type='LoadVideo', short_side=480)],
        test_mode=True,
    ),
)
test_evaluator = dict(type='DAVISMetric', out_file='objects.csv')

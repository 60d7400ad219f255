# JHMDB (test list of split 1, 268 videos), as UVC and Contrastive Random Walk read it: frames of 320 x 320 pixels
test_dataloader = dict(
    batch_size=1,  # of videos; of frames it is the model's
    num_workers=0,  # frames are read by the model, one after the other
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='pseudo_collate'),
    dataset=dict(
        type='JHMDBDataset',
        data_root='data/JHMDB',
        ann_file='test.txt',
        pipeline=[dict(type='LoadVideo', size=(320, 320))],
        test_mode=True,
    ),
)
test_evaluator = dict(type='JHMDBMetric')

# as DIFT_adm, with the small model of pixel space: its timestep, its metric, and the block that ends at stride 2
_base_ = './_base_.py'

model = dict(
    backbone=dict(
        model='{{ fileDirname }}/../../../demo/tiny-adm',
        layers=['adm-5'],
        channels=[48],
        timesteps=[41],
    ),
    metric='l2',
)

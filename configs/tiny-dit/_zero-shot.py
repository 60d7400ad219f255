# matching with block 5 of the small transformer, on the pairs of ../correspondence/toy and at the timestep that
# tools/search.py configs/tiny-dit/search-pairs.py finds best on training pairs; every seed draws other noise
_base_ = '../correspondence/toy/_zero-shot.py'

model = dict(
    backbone=dict(
        model='{{ fileDirname }}/../../demo/tiny-dit', layers=['vit-block5-mod'], channels=[192], timesteps=[350]
    )
)

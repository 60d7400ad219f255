# blocks and timestep are not published for this model: the same share of the depth, and of noise, as for Flux
_base_ = './text_masks.py'

model = dict(
    model='sd3-medium',
    blocks=[14, 15, 16, 17],
    timesteps=[0.5],
)

_base_ = './_base_.py'

channels = [64, 64, 64, 48]  # those of the four layers
timesteps = 3
model = dict(
    neck=dict(_delete_=True, type='ConcatNeck', levels=[channels], timesteps=timesteps),
    decode_head=dict(in_channels=timesteps * sum(channels)),
)

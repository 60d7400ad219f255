# DDPM's timesteps with the small model of pixel space, all of its output blocks
_base_ = './tiny-sd-t50_pixel-classifier_1xb64-100e_toy-64x64.py'

timesteps = [50, 150, 250]
channels = [64, 64, 64, 48, 48, 48, 32, 32, 32, 16, 16, 16]
model = dict(
    backbone=dict(
        model='{{ fileDirname }}/../../demo/tiny-adm',
        layers=[f'adm-{i}' for i in range(12)],
        channels=channels,
        timesteps=timesteps,
    ),
    decode_head=dict(in_channels=[len(timesteps) * each for each in channels]),
)

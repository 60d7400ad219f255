# DINOv2 ViT-B/14 alone, under the same neck and heads as the diffusion models. As usual for plain transformers, its
# maps of one size become a pyramid, from the fourfold to half the size; earlier blocks are given to finer levels.
_base_ = './diffusion_upernet.py'

layers = {3: 768, 6: 768, 9: 768, 12: 768}  # stride 14: 37 cells for 518 pixels
model = dict(
    backbone=dict(
        _delete_=True,
        type='VisionBackbone',
        model='dinov2-b',
        layers=list(layers),
        channels=list(layers.values()),
        input_size=518,
    ),
    neck=dict(
        levels=[[channels] for channels in layers.values()],
        timesteps=1,
        output_sizes=[148, 74, 37, 19],
        layer_names=[[f'stage{n}'] for n in layers],
    ),
    decode_head=dict(in_channels=[512, 512, 512, 512], in_index=[0, 1, 2, 3]),
)

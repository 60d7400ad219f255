# Stable Diffusion 1.5 and DINOv2 ViT-B/14 together: DINOv2's maps of stride 14 join the level of stride 16
_base_ = './diffusion_upernet.py'

sd15 = [
    {'up-level3-repeat0-vit-block0-self-k': 320},  # stride 8
    {'up-level2-repeat1-vit-block0-cross-q': 640},  # stride 16
    {'up-level1-repeat1-vit-block0-cross-q': 1280, 'up-level1-repeat2-res-out': 1280},  # stride 32
]
dinov2 = [{}, {3: 768, 6: 768, 9: 768, 12: 768}, {}]
timesteps = [50]
backbones = [
    dict(
        type='DiffusionBackbone',
        model='sd15',
        layers=[layer for level in sd15 for layer in level],
        channels=[channels for level in sd15 for channels in level.values()],
        levels=[len(level) for level in sd15],
        timesteps=timesteps,
    ),
    dict(
        type='VisionBackbone',
        model='dinov2-b',
        layers=[layer for level in dinov2 for layer in level],
        channels=[channels for level in dinov2 for channels in level.values()],
        levels=[len(level) for level in dinov2],
        input_size=518,
    ),
]
pairs = list(zip(sd15, dinov2, strict=True))
model = dict(
    backbone=dict(_delete_=True, type='EnsembleBackbone', backbones=backbones),
    neck=dict(
        levels=[[*a.values(), *b.values()] for a, b in pairs],
        timesteps=[[*(len(timesteps) for _ in a), *(1 for _ in b)] for a, b in pairs],
        layer_names=[[*(f'sd15 {name}' for name in a), *(f'dinov2 stage{n}' for n in b)] for a, b in pairs],
        timestep_names=timesteps,
    ),
    decode_head=dict(in_channels=[512, 512, 512], in_index=[0, 1, 2]),
)

"""A tiny segmentor on a tiny diffusion model, and data for it."""

import runpy
from pathlib import Path

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from PIL import Image
from torch import nn

import diffseg.models  # noqa: F401

ROOT = Path(__file__).parents[1]
LEVELS = [
    {'up-level3-repeat0-vit-block0-self-k': 32, 'up-level2-repeat1-vit-block0-cross-q': 32},  # strides 8 and 16
    {'up-level1-repeat2-res-out': 64, 'up-level1-repeat1-vit-block0-cross-q': 64},  # stride 32
]
LAYERS = [name for level in LEVELS for name in level]
CHANNELS = [list(level.values()) for level in LEVELS]
TIMESTEPS = [50, 261, 500]
CLASSES = 3
CONFIG = """
_base_ = {base!r}

model = {model!r}
dataset = dict(
    type='BaseSegDataset',
    data_root={data_root!r},
    data_prefix=dict(img_path='images', seg_map_path='labels'),
    img_suffix='.png',
    metainfo=dict(classes={classes!r}, palette={palette!r}),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')],
)
train_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler'), dataset=dataset)
val_dataloader = dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='IoUMetric')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
param_scheduler = [dict(type='PolyLR', end=4, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2, save_best='mIoU'),
)
"""


def backbone_config(folder: Path, **options) -> dict:
    """A DiffusionBackbone of four layers and three timesteps."""
    defaults = {'model': str(folder), 'layers': LAYERS, 'timesteps': TIMESTEPS}
    return {'type': 'DiffusionBackbone', **defaults, **options}


def segmentor_config(folder: Path, backbone: dict | None = None, **options) -> ConfigDict:
    """EncoderDecoder of DiffusionBackbone, AggregationNeck and FCNHead; `options` override its fields."""
    defaults = {
        'type': 'EncoderDecoder',
        'data_preprocessor': {
            'type': 'SegDataPreProcessor',
            'mean': [127.5] * 3,
            'std': [127.5] * 3,
            'bgr_to_rgb': True,
            'size': (64, 96),
            'seg_pad_val': 255,
        },
        'backbone': backbone_config(folder, **(backbone or {})),
        'neck': {
            'type': 'AggregationNeck',
            'levels': CHANNELS,
            'timesteps': len(TIMESTEPS),
            'out_channels': 32,
            'num_groups': 4,
        },
        'decode_head': {
            'type': 'FCNHead',
            'in_channels': [32, 32],
            'in_index': [0, 1],
            'input_transform': 'resize_concat',
            'channels': 16,
            'num_convs': 1,
            'concat_input': False,
            'dropout_ratio': 0,
            'num_classes': CLASSES,
            'norm_cfg': {'type': 'BN'},
            'align_corners': False,
        },
        'test_cfg': {'mode': 'whole'},
    }
    return ConfigDict({**defaults, **options})


def build_segmentor(folder: Path, seed: int = 0, **options) -> nn.Module:
    """Build `segmentor_config(folder, **options)`."""
    init_default_scope('mmseg')
    torch.manual_seed(seed)
    return MODELS.build(segmentor_config(folder, **options))


def sample(index: int, height: int = 64, width: int = 96) -> dict:
    """Random image (3, H, W) with values 0 to 255 and random labels, as mmseg's datasets give them."""
    generator = torch.Generator().manual_seed(index)
    image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (1, height, width), generator=generator)
    meta = {'ori_shape': (height, width), 'img_shape': (height, width), 'pad_shape': (height, width)}
    return {'inputs': image, 'data_samples': SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=meta)}


def batch(*indices: int) -> dict:
    """The samples of these indices, collated."""
    samples = [sample(index) for index in indices]
    return {key: [item[key] for item in samples] for key in ('inputs', 'data_samples')}


def write_experiment(folder: Path, model: dict, size: tuple[int, int] = (64, 96), images: int = 3) -> Path:
    """Write random images with labels, and a config that trains a segmentor on them for two iterations.

    Args:
        folder: Exists.
        model: Config of the segmentor.
        size: Height and width of the images.
        images: Their number.
    """
    generator = np.random.default_rng(0)
    for kind, shape, values in (('images', (*size, 3), 256), ('labels', size, CLASSES)):
        (folder / kind).mkdir()
        for index in range(images):
            pixels = generator.integers(values, size=shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f'{index}.png')
    path = folder / 'tiny.py'
    path.write_text(
        CONFIG.format(
            base=str(ROOT / 'configs' / '_base_' / 'default_runtime.py'),
            model=model,
            data_root=str(folder),
            classes=[str(i) for i in range(CLASSES)],
            palette=[[i, i, i] for i in range(CLASSES)],
        )
    )
    return path


def run_tool(tool: str, *arguments: str | Path) -> dict[str, float] | None:
    """Call main of tools/TOOL.py."""
    main = runpy.run_path(str(ROOT / 'tools' / f'{tool}.py'))['main']
    return main([str(argument) for argument in arguments])

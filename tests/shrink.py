"""Shipped configs at a size that a test can train: tiny models of the same topology, and every length an eighth."""

import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import tiny_vision
from mmengine.config import Config
from parts import sites_of

from diffseg.diffusion.loading import load_config
from diffseg.diffusion.sites import Site, resolve
from diffseg.models.backbones.ensemble import join_levels

FACTOR = 8
BLOCK = re.compile(r'vit-block(\d+)-')  # of a transformer
WIDTH = 32  # of necks


def shrink(path: Path, models: Mapping[str, Path], data_root: Path, work_dir: Path, max_iters: int) -> Config:
    """Read a config and change nothing but sizes, places, and numbers of channels.

    Args:
        path: of the config.
        models: for each model that configs name, the folder of a tiny one.
        data_root: of the data set.
        work_dir: of the run.
        max_iters: iterations to train.
    """
    # formatting the text of a config takes a second, and a run does it six times
    cfg = Config(Config.fromfile(path).to_dict(), filename=str(path), format_python_code=False)
    channels = shrink_backbone(cfg.model.backbone, models)
    levels = shrink_neck(cfg.model.get('neck'), channels)
    for head in (cfg.model.decode_head, cfg.model.get('auxiliary_head')):
        if head is not None:
            shrink_head(head, levels)
    cfg.model.data_preprocessor.size = divide(cfg.model.data_preprocessor.size)
    cfg.model.test_cfg = {key: divide(value) for key, value in cfg.model.test_cfg.items()}

    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.num_workers, loader.persistent_workers = 0, False
        loader.dataset.data_root = str(data_root)
        shrink_pipeline(loader.dataset.pipeline)
    for alternatives in cfg.tta_pipeline[-1].transforms:
        shrink_pipeline(alternatives)
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.train_dataloader.batch_size = 2  # batch norm needs two, where a map is one cell

    cfg.train_cfg.max_iters, cfg.train_cfg.val_begin = max_iters, max_iters + 1  # no validation
    # the first steps of a warm-up are below the resolution of float32
    cfg.param_scheduler = [scheduler for scheduler in cfg.param_scheduler if scheduler.type != 'LinearLR']
    cfg.default_hooks.checkpoint.interval = cfg.default_hooks.logger.interval = 1
    cfg.work_dir = str(work_dir)
    return cfg


def shrink_pipeline(steps: list[dict]) -> None:
    """Divide the sizes of a pipeline's steps."""
    for step in steps:
        for key in ('scale', 'scales', 'max_size', 'crop_size'):
            if key in step:
                step[key] = divide(step[key])


def divide(value: Any) -> Any:
    """Pixels, or a sequence of them, by the factor; what is no number stays."""
    if isinstance(value, list | tuple):
        return type(value)(map(divide, value))
    return max(1, value // FACTOR) if isinstance(value, int) else value


def shrink_backbone(backbone: dict, models: Mapping[str, Path]) -> list[int]:
    """Replace the models; the channels of the maps."""
    if backbone.type == 'EnsembleBackbone':
        members = [shrink_backbone(member, models) for member in backbone.backbones]
        levels = [m.get('levels') or [len(c)] for m, c in zip(backbone.backbones, members, strict=True)]
        return join_levels(members, levels)

    backbone.model = str(models[backbone.model])
    if backbone.get('input_size'):
        backbone.input_size = divide(backbone.input_size)
    if backbone.type == 'VisionBackbone':
        backbone.layers = list(range(-len(backbone.layers), 0))
        backbone.channels = [tiny_vision.WIDTH] * len(backbone.layers)
        return backbone.channels

    if backbone.type == 'MetaPromptsBackbone':
        return [backbone.num_prompts] * 4
    if 'conditioner' in backbone:
        if 'model' in backbone.conditioner:
            backbone.conditioner.update(model=backbone.model, templates=['a {}'])  # not 80
        else:
            backbone.conditioner.dim = load_config(backbone.model).network['cross_attention_dim']
    available = sites_of(backbone.model)
    shrink_blocks(backbone, available)
    names = [*backbone.layers, *['attn'] * (len(backbone.channels) - len(backbone.layers))]
    names = resolve(names, [*available, *names])
    backbone.channels = [
        available[name].channels if name in available else channels  # those of attention are tokens
        for name, channels in zip(names, backbone.channels, strict=True)
    ]
    return backbone.channels


def shrink_blocks(backbone: dict, available: Mapping[str, Site]) -> None:
    """Read the last blocks of a transformer in place of others, and discard other channels."""
    blocks = {name: int(match[1]) for name in backbone.layers if (match := BLOCK.match(name))}
    deepest = max((int(match[1]) for name in available if (match := BLOCK.match(name))), default=0)
    first = deepest + 1 - len(set(blocks.values()))
    smaller = {block: i for i, block in enumerate(sorted(set(blocks.values())), first)}
    backbone.layers = [
        BLOCK.sub(f'vit-block{smaller[blocks[name]]}-', name) if name in blocks else name for name in backbone.layers
    ]
    if 'discard' in backbone:
        backbone.discard = list(range(len(backbone.discard)))


def shrink_neck(neck: dict | None, channels: list[int]) -> list[int]:
    """Adapt a neck to the channels of its inputs; the channels of its outputs."""
    if neck is None:
        return channels
    if neck.type == 'NeckSequence':
        for part in neck.necks:
            channels = shrink_neck(part, channels)
        return channels
    if neck.type in ('FPN', 'MultiLevelNeck'):
        neck.in_channels, neck.out_channels = channels, WIDTH
        return [WIDTH] * (neck.num_outs if neck.type == 'FPN' else len(neck.scales))
    remaining = iter(channels)
    neck.levels = [list(islice(remaining, len(level))) for level in neck.levels]
    if neck.type == 'AggregationNeck':
        neck.out_channels, neck.num_groups = WIDTH, WIDTH // 8
        return [WIDTH] * len(neck.levels)
    return [sum(level) for level in neck.levels]


def shrink_head(head: dict, levels: list[int]) -> None:
    """Adapt a head to the channels of the levels, and make it narrow."""
    index = head.get('in_index', list(range(len(levels))))
    head.in_channels = [levels[i] for i in index] if isinstance(index, list) else levels[index]
    if 'channels' in head:
        head.channels = 16

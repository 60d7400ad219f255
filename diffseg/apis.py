"""Matching of two image files outside of a data set, for the tools in `tools/apply`."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from safetensors import safe_open
from torch import Tensor

from diffseg.diffusion.images import image_size
from diffseg.diffusion.layer_sets import expand
from diffseg.diffusion.loading import meta_network
from diffseg.diffusion.schedules import Timestep
from diffseg.diffusion.sites import sites
from diffseg.inspection import dataset_configs, load_weights
from diffseg.models import CorrespondenceModel
from diffseg.structures import PairSample

logger = logging.getLogger(__name__)


def load_matcher(
    config: str | Path, checkpoint: str | Path | None = None, category: str | None = None
) -> tuple[CorrespondenceModel, list[dict[str, Any]]]:
    """Build the `CorrespondenceModel` of a config, and the pipeline that prepares its images.

    Args:
        config: path of the config.
        checkpoint: of the model; None for zero-shot configs.
        category: of the objects, which the prompt may name.

    Raises:
        OSError: the checkpoint does not exist or is none.
        ValueError: the config has another model, the checkpoint does not fit, or the prompt names a category, which is
            not given.
    """
    init_default_scope('mmseg')
    cfg = Config.fromfile(config)
    if cfg.get('model', {}).get('type') != 'CorrespondenceModel':
        raise ValueError(f'{config}: its model is not a CorrespondenceModel')
    model = MODELS.build(cfg.model)
    if checkpoint is not None:
        load_weights(model, checkpoint, config)
    if model.prompt is not None and '{category}' in model.prompt and category is None:
        raise ValueError(f'the prompt of {config} is {model.prompt!r}; give --category')
    return model, next(dataset_configs(cfg.test_dataloader.dataset)).pipeline


def zero_shot_matcher(
    model: str,
    layers: Sequence[str],
    timesteps: Sequence[Timestep],
    *,
    size: tuple[int, int] | None = None,
    **backbone: Any,
) -> tuple[CorrespondenceModel, list[dict[str, Any]]]:
    """Build a model that matches activations, and the pipeline that prepares its images.

    Args:
        model: preset, hub id, diffusers folder or checkpoint file.
        layers: names, aliases, patterns or names of sets.
        timesteps: at which they are read.
        size: height and width to which images are resized; None keeps the size of each image.
        **backbone: further options of `DiffusionBackbone`: `trajectory`, `prompt`, `ensemble`, `dtype`, ...

    Raises:
        ValueError: unknown layers or options.
    """
    init_default_scope('mmseg')
    available = sites(meta_network(model))
    layers = expand(layers, available)
    levels = [[available[layer].channels for layer in layers]]
    config = {
        'type': 'CorrespondenceModel',
        'backbone': {
            'type': 'DiffusionBackbone',
            'model': model,
            'layers': layers,
            'timesteps': timesteps,
            **backbone,
        },
        'neck': {'type': 'ConcatNeck', 'levels': levels, 'timesteps': len(timesteps)},
    }
    resize = [] if size is None else [{'type': 'ResizePair', 'size': size}]
    return MODELS.build(config), [{'type': 'LoadPair'}, *resize, {'type': 'PackPair'}]


def prepare_pair(
    paths: Sequence[Path], points: np.ndarray, pipeline: Sequence[Mapping[str, Any]], category: str | None
) -> dict[str, Any]:
    """A batch of one pair, as from a data set with this pipeline.

    Args:
        paths: of the source and the target.
        points: (x, y) in pixels of the source's file, with shape (N, 2).
        pipeline: configs of transforms.
        category: of the objects, for `{category}` in the model's prompt.

    Raises:
        ValueError: a point lies outside the source, or the pipeline crops.
    """
    results: dict[str, Any] = {'category': category, 'pair_id': '0', 'variations': {}}
    results['visible'] = np.ones(len(points), dtype=bool)
    for view, path in enumerate(paths):
        height, width = image_size(path)
        results |= {f'img_path{view}': str(path), f'keypoints{view}': points.copy()}
        results[f'bbox{view}'] = np.array([0, 0, width - 1, height - 1], dtype=np.float32)
        if view == 0 and ((points < 0) | (points > (width - 1, height - 1))).any():
            raise ValueError(f'points {points.tolist()} are not all inside {path}, which has {width} x {height} pixels')
    sample = Compose(pipeline)(results)
    for view, path in enumerate(paths):
        if sample['data_samples'].get(f'ori_shape{view}') != image_size(path):
            raise ValueError("the config's pipeline crops images, so that points would lie elsewhere in them")
    return {'inputs': {k: [v] for k, v in sample['inputs'].items()}, 'data_samples': [sample['data_samples']]}


def read_maps(path: Path, model: CorrespondenceModel) -> list[Tensor]:
    """The backbone's maps (1, T*C, h, w) from a file of activations.

    Raises:
        ValueError: layers or timesteps of the backbone are missing in the file.
    """
    extractor = getattr(model.backbone, 'extractor', None)
    if extractor is None:
        raise ValueError(f'--features is for a DiffusionBackbone, not {type(model.backbone).__name__}')
    with safe_open(path, 'pt') as file:
        stored = json.loads(file.metadata()['timesteps'])
        if missing := set(extractor.layers) - set(file.keys()):
            raise ValueError(f'{path} has no {", ".join(sorted(missing))}; it has {", ".join(file.keys())}')
        if set(extractor.timesteps) <= set(stored):
            rows = [stored.index(t) for t in extractor.timesteps]
        elif len(stored) == len(extractor.timesteps):
            rows = list(range(len(stored)))
            logger.warning(f'{path.name}: timesteps {stored} in place of {list(extractor.timesteps)}')
        else:
            raise ValueError(
                f'{path} has timesteps {stored}, the model reads {list(extractor.timesteps)}; the file needs these, or '
                f'the same number of others'
            )
        return [file.get_tensor(layer)[rows].flatten(0, 1)[None].float() for layer in extractor.layers]


def descriptors_of(
    model: CorrespondenceModel, image: Tensor, sample: PairSample, view: int, features: Path | None
) -> Tensor:
    """Descriptors (C, h, w) of an image (3, H, W), from its file in the folder `features` if there is one."""
    if features is not None:
        path = features / f'{Path(sample.get(f"img_path{view}")).name}.safetensors'
        if path.is_file():
            maps = [x.to(image.device) for x in read_maps(path, model)]
            return model.describe(maps)[0]
    prompt = None if model.prompt is None else model.prompt.format(category=sample.category)
    return model.encode(image[None], [prompt])[0]

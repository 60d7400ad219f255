"""Find in one image what lies at given points of another, and draw it.

    python tools/match.py a.jpg b.jpg --points 120,80 33,200 --out matches.png --heatmap similarity.png \\
        --model sd21 --layers dift --timesteps 261 --size 768
    python tools/match.py a.jpg b.jpg --points points.csv --out matches.png --config CONFIG --checkpoint PTH

The first form compares activations of a diffusion model, those of several layers and timesteps concatenated; the second
uses what was trained, and prepares images as its config does for tests. Points are (x, y) in pixels of the image file:
on the command line, or in a file, a line for each (or JSON or .npy). The matches are printed as CSV or JSON, with their
cosine similarity. The picture of `--heatmap` has a row for each point: the source, and its similarity with every pixel
of the target, from the lowest (dark, its value in brackets) to the highest.

With `--features FOLDER` the activations of an image NAME are read from FOLDER/NAME.safetensors, if there is such a
file, instead of being computed: `generate.py` writes them for the images that it generates, `extract_features.py` for
others. Of the timesteps in a file the wanted ones are taken; or if it has others, but as many, these in their order. So
a model that was trained on inverted images can match generated ones:

    python tools/match.py generated/a-0.png generated/b-0.png --features generated --config CONFIG --checkpoint PTH ...
"""

import argparse
import csv
import json
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from mmseg.registry import MODELS
from safetensors import SafetensorError, safe_open
from torch import Tensor

import diffseg  # noqa: F401  registers its parts and lets checkpoints be read
from diffseg.diffusion.images import image_size, read_image
from diffseg.diffusion.layer_sets import expand
from diffseg.diffusion.loading import meta_unet
from diffseg.diffusion.sites import sites
from diffseg.keypoints import read_keypoints
from diffseg.models import CorrespondenceModel
from diffseg.models.correspondence import UpsampledSimilarity, descriptors_at
from diffseg.structures import PairSample
from diffseg.visualization import grid, heat_map, match_lines, overlay, to_picture

COLUMNS = 'source_x', 'source_y', 'target_x', 'target_y', 'similarity'
MARK = (0.0, 1.0, 0.0)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path)
    parser.add_argument('target', type=Path)
    parser.add_argument('--points', nargs='+', required=True, metavar='X,Y', help='in the source, or a file of them')
    add_model_arguments(parser)
    parser.add_argument('--features', type=Path, metavar='FOLDER', help='activations to read instead of computing them')
    parser.add_argument('--out', type=Path, required=True, metavar='PNG', help='the picture of both images and lines')
    parser.add_argument('--heatmap', type=Path, metavar='PNG', help='the picture of similarities')
    parser.add_argument('--format', choices=('csv', 'json'), default='csv', help='of what is printed')
    args = parser.parse_args(argv)
    check_model_arguments(parser, args)
    return args


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What says by which model images are compared, see `load`."""
    parser.add_argument('--config', help='of a CorrespondenceModel')
    parser.add_argument('--checkpoint', help='of that model (default: none, as for zero-shot configs)')
    parser.add_argument('--category', help="of the objects, where the config's prompt names it")
    parser.add_argument('--model', help='preset, hub id, diffusers folder or checkpoint file, instead of a config')
    parser.add_argument('--layers', nargs='+', help='layer names, aliases, patterns or set names')
    parser.add_argument('--timesteps', nargs='+', type=int)
    parser.add_argument('--trajectory', default='noise', choices=('noise', 'clean', 'inversion'))
    parser.add_argument('--prompt', default='')
    parser.add_argument('--ensemble', type=int, default=1, help='noises averaged')
    parser.add_argument('--size', nargs='+', type=int, help="resize to S x S or H x W (default: each image's own size)")
    parser.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'), default='float32')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')


def check_model_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message if they do not go together; `size` becomes a pair."""
    if (args.config is None) == (args.model is None):
        parser.error('give either --config or --model')
    if args.model is not None and (not args.layers or not args.timesteps):
        parser.error('--model needs --layers and --timesteps')
    if args.size and len(args.size) > 2:
        parser.error('--size takes one number or two')
    args.size = tuple(args.size * 2)[:2] if args.size else None


def read_points(given: Sequence[str]) -> np.ndarray:
    """Points as they are given, or from a file, with shape (N, 2), float32.

    Raises:
        ValueError: something is not a pair of numbers.
    """
    if len(given) == 1 and ',' not in given[0]:
        return read_keypoints(given[0])
    try:
        points = np.array([text.split(',') for text in given], dtype=np.float32)
    except ValueError:
        points = np.empty(0)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise ValueError(f'{" ".join(given)} are not points; give X,Y X,Y ..., or a file with a line X,Y for each')
    return points


def zero_shot(args: argparse.Namespace) -> dict[str, Any]:
    """Config of a model that compares activations as they are."""
    available = sites(meta_unet(args.model))
    layers = expand(args.layers, available)
    return {
        'type': 'CorrespondenceModel',
        'backbone': {
            'type': 'DiffusionBackbone',
            'model': args.model,
            'layers': layers,
            'timesteps': args.timesteps,
            'trajectory': args.trajectory,
            'prompt': args.prompt,
            'ensemble': args.ensemble,
            'dtype': args.dtype,
        },
        'neck': {
            'type': 'ConcatNeck',
            'levels': [[available[layer].channels for layer in layers]],
            'timesteps': len(args.timesteps),
        },
    }


def load(args: argparse.Namespace) -> tuple[CorrespondenceModel, list[dict[str, Any]]]:
    """The model, and the pipeline that prepares images for it."""
    init_default_scope('mmseg')
    if args.config is None:
        resize = [] if args.size is None else [{'type': 'ResizePair', 'size': args.size}]
        return MODELS.build(zero_shot(args)), [{'type': 'LoadPair'}, *resize, {'type': 'PackPair'}]
    cfg = Config.fromfile(args.config)
    if cfg.get('model', {}).get('type') != 'CorrespondenceModel':
        raise ValueError(f'{args.config}: its model is no CorrespondenceModel')
    model = MODELS.build(cfg.model)
    if args.checkpoint is not None:
        try:
            load_checkpoint(model, args.checkpoint, map_location='cpu', strict=True, logger='silent')
        except RuntimeError as error:
            raise ValueError(f'{args.checkpoint} does not fit {args.config}: {error}') from error
    if model.prompt is not None and '{category}' in model.prompt and args.category is None:
        raise ValueError(f'the prompt of {args.config} is {model.prompt!r}; say --category')
    return model, cfg.test_dataloader.dataset.pipeline


def prepare(paths: Sequence[Path], points: np.ndarray, pipeline: Sequence[Mapping[str, Any]], category: str) -> dict:
    """A batch of the one pair, as the data set of the pipeline would give it."""
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
        ValueError: it lacks layers or timesteps of the backbone.
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
            print(f'{path.name}: timesteps {stored} in place of {list(extractor.timesteps)}', file=sys.stderr)
        else:
            raise ValueError(
                f'{path} has timesteps {stored}, the model reads {list(extractor.timesteps)}; let it have these, or as '
                f'many others'
            )
        return [file.get_tensor(layer)[rows].flatten(0, 1)[None].float() for layer in extractor.layers]


def describe(model: CorrespondenceModel, image: Tensor, sample: PairSample, view: int, features: Path | None) -> Tensor:
    """Descriptors (C, h, w) of an image (3, H, W)."""
    if features is not None:
        path = features / f'{Path(sample.get(f"img_path{view}")).name}.safetensors'
        if path.is_file():
            maps = [x.to(image.device) for x in read_maps(path, model)]
            return model.describe(maps)[0]
    prompt = None if model.prompt is None else model.prompt.format(category=sample.category)
    return model.encode(image[None], [prompt])[0]


def marked(picture: Tensor, point: Sequence[float]) -> Tensor:
    """A picture with a ring of MARK's colour around a point."""
    rows, columns = (torch.arange(side, dtype=torch.float) for side in picture.shape[1:])
    radius = max(2.0, max(picture.shape[1:]) / 40)
    distance = torch.hypot(columns - point[0], (rows - point[1])[:, None])
    ring = (distance - radius).abs() <= max(0.5, radius / 4)
    return picture.where(~ring, torch.tensor(MARK)[:, None, None])


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    paths = args.source, args.target
    points = read_points(args.points)
    pictures = [to_picture(read_image(path)) for path in paths]
    model, pipeline = load(args)
    model.to(args.device).eval()
    data = model.data_preprocessor(prepare(paths, points, pipeline, args.category))
    (sample,) = data['data_samples']
    maps = [describe(model, data['inputs'][f'image{view}'][0], sample, view, args.features) for view in (0, 1)]
    matches = model.match(*maps, sample)  # (N, 2)

    queries = descriptors_at(maps[0], sample.keypoints0.round(), sample.ori_shape0)  # (N, C)
    rows, names, table = [], [], []
    for point, match, query in zip(points.tolist(), matches.tolist(), queries, strict=True):
        similarity = UpsampledSimilarity.of(query[None], maps[1], sample.ori_shape1)
        values = similarity.rows(0, sample.ori_shape1[0])[0].cpu()  # (H, W)
        x, y = (min(max(round(c), 0), side - 1) for c, side in zip(match, sample.ori_shape1[::-1], strict=True))
        table.append([round(value, 4) for value in (*point, *match, values[y, x].item())])
        if args.heatmap is not None:
            warm = overlay(pictures[1], heat_map(values), alpha=0.7)
            rows.append([marked(pictures[0], point), marked(warm, match)])
            names.append(f'{point[0]:g}, {point[1]:g} ({values.min():.2f} to {values.max():.2f})')

    for path in (args.out, args.heatmap):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    match_lines(tuple(pictures), (torch.from_numpy(points), matches.float())).save(args.out, 'PNG')
    if args.heatmap is not None:
        grid(rows, names, [path.name for path in paths], cell=256, smooth=True).save(args.heatmap, 'PNG')
    if args.format == 'json':
        print(json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in table], indent=1))
    else:
        csv.writer(sys.stdout, lineterminator='\n').writerows([COLUMNS, *table])


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError, FloatingPointError, SafetensorError, pickle.UnpicklingError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    raise SystemExit(main())

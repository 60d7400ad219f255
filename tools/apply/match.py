"""Match points of one image with another image, and draw the matches.

    python tools/apply/match.py a.jpg b.jpg --points 120,80 33,200 --out matches.png --heatmap similarity.png \\
        --model sd21 --layers dift --timesteps 261 --size 768
    python tools/apply/match.py a.jpg b.jpg --points points.csv --out matches.png --config CONFIG --checkpoint PTH

The first form compares activations of a diffusion model, those of several layers and timesteps concatenated; the second
uses a trained model, and prepares images with the test pipeline of its config. Points are (x, y) in pixels of the image
file: on the command line, or in a file, a line for each (or JSON or .npy). The matches are printed as CSV or JSON, with
their cosine similarity. The picture of `--heatmap` has a row for each point: the source, and its similarity with every
pixel of the target, from the lowest (dark, its value in brackets) to the highest.

With `--cycle-error` every match is matched back, and the distance in pixels between a point and where it comes back to
is printed: a match is the more reliable the smaller it is. The picture's lines are then green for 0 to red for a tenth
of the source's longer side and more.

With `--features FOLDER` the activations of an image NAME are read from FOLDER/NAME.safetensors, if this file exists,
instead of being computed: `generate.py` writes them for the images that it generates, `extract_features.py` for others.
The model's timesteps are read from the file; if it has the same number of other timesteps, those are used in their
order. So a model that was trained on inverted images can match generated ones:

    python tools/apply/match.py generated/a-0.png generated/b-0.png --features generated --config CONFIG ...
"""

import argparse
import csv
import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

import diffseg  # noqa: F401  registers its parts and lets checkpoints be read
from diffseg.apis import descriptors_of, prepare_pair
from diffseg.command_line import add_model_arguments, check_model_arguments, matcher_of
from diffseg.diffusion.images import read_image
from diffseg.keypoints import read_keypoints
from diffseg.models.correspondence import UpsampledSimilarity, descriptors_at
from diffseg.visualization import grid, heat_map, match_lines, overlay, to_picture

COLUMNS = 'source_x', 'source_y', 'target_x', 'target_y', 'similarity'
MARK = (0.0, 1.0, 0.0)
UNRELIABLE = 0.1  # cycle error as a fraction of the source's longer side, from which on a line is red


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path)
    parser.add_argument('target', type=Path)
    parser.add_argument('--points', nargs='+', required=True, metavar='X,Y', help='in the source, or a file of them')
    add_model_arguments(parser)
    parser.add_argument('--features', type=Path, metavar='FOLDER', help='activations to read instead of computing them')
    parser.add_argument('--out', type=Path, required=True, metavar='PNG', help='the picture of both images and lines')
    parser.add_argument('--heatmap', type=Path, metavar='PNG', help='the picture of similarities')
    parser.add_argument('--cycle-error', action='store_true', help='print and draw how reliable each match is')
    parser.add_argument('--format', choices=('csv', 'json'), default='csv', help='of what is printed')
    args = parser.parse_args(argv)
    check_model_arguments(parser, args)
    return args


def read_points(arguments: Sequence[str]) -> np.ndarray:
    """Points from X,Y arguments or from a file, with shape (N, 2), float32.

    Raises:
        ValueError: an argument is not a pair of numbers.
    """
    if len(arguments) == 1 and ',' not in arguments[0]:
        return read_keypoints(arguments[0])
    try:
        points = np.array([text.split(',') for text in arguments], dtype=np.float32)
    except ValueError:
        points = np.empty(0)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise ValueError(f'{" ".join(arguments)} are not points; give X,Y X,Y ..., or a file with a line X,Y for each')
    return points


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
    model, pipeline = matcher_of(args)
    model.to(args.device).eval()
    data = model.data_preprocessor(prepare_pair(paths, points, pipeline, args.category))
    (sample,) = data['data_samples']
    maps = [descriptors_of(model, data['inputs'][f'image{view}'][0], sample, view, args.features) for view in (0, 1)]
    matches = model.match(*maps, sample)  # (N, 2)
    errors = model.measure_cycle(*maps, sample, matches) if args.cycle_error else None  # (N,)

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
    confidence = None if errors is None else (1 - errors / (UNRELIABLE * max(sample.ori_shape0))).clamp(min=0)
    lines = match_lines(tuple(pictures), (torch.from_numpy(points), matches.float()), confidence=confidence)
    lines.save(args.out, 'PNG')
    if args.heatmap is not None:
        grid(rows, names, [path.name for path in paths], cell=256, smooth=True).save(args.heatmap, 'PNG')
    columns = COLUMNS
    if errors is not None:
        columns = (*COLUMNS, 'cycle_error')
        table = [[*row, round(error, 4)] for row, error in zip(table, errors.tolist(), strict=True)]
    if args.format == 'json':
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in table], indent=1))
    else:
        csv.writer(sys.stdout, lineterminator='\n').writerows([columns, *table])


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

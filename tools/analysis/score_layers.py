"""Match the keypoints of image pairs with every single activation of a model, and print its PCK.

    python tools/analysis/score_layers.py sd21 data/SPair-71k --timestep 261 --size 768 --ensemble 8
    python tools/analysis/score_layers.py demo/tiny-sd data/SPair-toy --timestep 0 50 100 200 --layers 'up-*' --seeds 3

With several timesteps the first figures of an activation are those at its best timestep; those at each one follow.

The data have the layout of SPair-71k; `tools/toy/make_data.py OUT --pairs N` draws a toy set.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from torch import Tensor
from tqdm import tqdm

from diffseg.command_line import add_dtype_argument, add_transformer_arguments, parse_timestep
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import read_image
from diffseg.diffusion.layer_sets import expand
from diffseg.diffusion.loading import meta_network
from diffseg.diffusion.schedules import Timestep
from diffseg.diffusion.sites import kind_of, sites
from diffseg.evaluation import correct_keypoints, pck
from diffseg.models.correspondence import match_points
from diffseg.search.engine import order, walk


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='preset, hub id, diffusers folder or checkpoint file')
    parser.add_argument('data', type=Path, help='folder with JPEGImages, PairAnnotation and so on')
    parser.add_argument('--split', default='test', choices=['trn', 'val', 'test'])
    parser.add_argument('--layers', nargs='+', help='names, patterns and sets (default: all but attention maps)')
    parser.add_argument('--timestep', type=parse_timestep, nargs='+', default=[50], help='one or several (default: 50)')
    parser.add_argument('--size', type=int, help='resize images to SIZE x SIZE (default: as they are)')
    parser.add_argument('--prompt', default='')
    parser.add_argument('--ensemble', type=int, default=1)
    add_transformer_arguments(parser)
    parser.add_argument('--seeds', type=int, default=1, help='number of noise seeds; figures are means')
    parser.add_argument('--random', action='store_true', help='use random weights in the network')
    parser.add_argument('--store-gb', type=float, default=8, help='activations to keep between pairs (default: 8)')
    add_dtype_argument(parser)
    parser.add_argument('--device', default=get_device(), help='(default: %(default)s)')
    parser.add_argument('--best', type=int, default=10, help='how many of the best activations to print')
    args = parser.parse_args(argv)
    try:
        score(args)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


def score(args: argparse.Namespace) -> None:
    network = meta_network(args.model)
    available = sites(network)
    extractor = DiffusionExtractor(
        args.model,
        expand(args.layers, available) if args.layers else [s.name for s in available.values() if s.kind != 'map'],
        args.timestep,
        prompt=args.prompt,
        ensemble=args.ensemble,
        dtype=args.dtype,
        discard=args.discard,
        embedded_guidance=args.embedded_guidance,
        weights={'random': [kind_of(network).part] if args.random else []},
        runtime={'device': args.device},
    ).to(args.device)
    paths = sorted((args.data / 'PairAnnotation' / args.split).glob('*.json'))
    if not paths:
        raise FileNotFoundError(
            f'no pairs in {args.data / "PairAnnotation" / args.split}; tools/toy/make_data.py --pairs draws a toy set'
        )
    pairs = [json.loads(path.read_text()) for path in paths]
    images = [image_paths(args.data, pair) for pair in pairs]
    positions = order(images)  # those that share images are near each other
    scores = {layer: [[] for _ in args.timestep] for layer in extractor.layers}  # (image, point) of every seed
    for seed in range(args.seeds):
        extractor.seed = seed
        activations = walk(
            [images[i] for i in positions],
            lambda position, view: extract(extractor, images[positions[position]][view], args.size, args.device),
            lambda maps: sum(x.nbytes for x in maps.values()),
            args.store_gb * 1e9,
        )
        correct = {}  # of every pair, of each layer (T, N)
        for i, maps in tqdm(zip(positions, activations, strict=True), desc=f'pairs, seed {seed}', total=len(pairs)):
            correct[i] = match_pair(pairs[i], maps, args.device)
        for layer, by_timestep in scores.items():
            for t, figures in enumerate(by_timestep):
                hits = [correct[i][layer][t] for i in range(len(pairs))]
                figures.append((pck(hits, 'image'), pck(hits, 'point')))
    print(table(scores, args.timestep, args.best))


def image_paths(data: Path, pair: Mapping[str, Any]) -> tuple[Path, Path]:
    """The source's and the target's file."""
    source, target = (data / 'JPEGImages' / pair['category'] / pair[f'{side}_imname'] for side in ('src', 'trg'))
    return source, target


@torch.no_grad()
def extract(extractor: DiffusionExtractor, path: Path, size: int | None, device: str) -> dict[str, Tensor]:
    """Activations {layer: (T, C, h, w)} of an image file, on the CPU."""
    image = read_image(path, size and (size, size)).to(device)
    return {layer: x[0].cpu() for layer, x in extractor(image[None]).items()}


def match_pair(pair: Mapping[str, Any], maps: Sequence[Mapping[str, Tensor]], device: str) -> dict[str, Tensor]:
    """For each activation, which keypoints are matched correctly at 0.1 of the target's box.

    Args:
        pair: the annotation.
        maps: activations {layer: (T, C, h, w)} of the source and of the target.
        device: to match on.

    Returns:
        bool with shape (T, N) for each layer, on the CPU.
    """
    shapes = [pair[f'{side}_imsize'][1::-1] for side in ('src', 'trg')]  # of (width, height, channels)
    points, truth = torch.tensor(pair['src_kps']), torch.tensor(pair['trg_kps'])
    x1, y1, x2, y2 = pair['trg_bndbox']
    correct = {}
    for layer in maps[0]:
        source, target = (view[layer].to(device).float() for view in maps)
        matches = [
            match_points(*descriptors, points, *shapes).cpu() for descriptors in zip(source, target, strict=True)
        ]
        correct[layer] = torch.stack([correct_keypoints(x, truth, max(x2 - x1, y2 - y1)) for x in matches])
    return correct


def table(
    scores: Mapping[str, Sequence[Sequence[tuple[float, float]]]], timesteps: Sequence[Timestep], best: int
) -> str:
    """The best activations at their best timestep, and the image means at each.

    Args:
        scores: for each activation and timestep, (image, point) of every seed.
        timesteps: T labels.
        best: how many activations.
    """
    grid = {
        layer: [statistics.mean(image for image, _ in seeds) for seeds in by_timestep]
        for layer, by_timestep in scores.items()
    }
    several = len(timesteps) > 1
    head = f'{"at t":>6} |' + ''.join(f'{t:>7}' for t in timesteps)
    lines = [f'{"activation":40} {"PCK@0.1-bbox/image":>20} {"/point":>14} {head if several else ""}']
    for layer in sorted(grid, key=lambda layer: max(grid[layer]), reverse=True)[:best]:
        index = grid[layer].index(max(grid[layer]))
        image, point = zip(*scores[layer][index], strict=True)
        tail = f'{timesteps[index]:>6} |' + ''.join(f'{value:7.2f}' for value in grid[layer])
        lines.append(f'{layer:40} {summary(image):>20} {summary(point):>14} {tail if several else ""}')
    if several:
        highest = ''.join(f'{max(column):7.2f}' for column in zip(*grid.values(), strict=True))
        lines.append(f'{"best of all activations":40} {"":>42} |{highest}')
    return '\n'.join(map(str.rstrip, lines))


def summary(values: Sequence[float]) -> str:
    """Mean ± standard deviation of a sample; the mean alone of a single value."""
    mean = f'{statistics.mean(values):.2f}'
    return f'{mean} ± {statistics.stdev(values):.2f}' if len(values) > 1 else mean


if __name__ == '__main__':
    raise SystemExit(main())

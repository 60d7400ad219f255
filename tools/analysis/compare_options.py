"""Time and accuracy of options of an extractor, such as dtypes: in turn, in one process.

    python tools/analysis/compare_options.py --model sd15 --random --size 512 --layers practical \\
        --options dtype=float32 dtype=auto,memory_format=auto
    python tools/analysis/compare_options.py photos --model sd15 --layers practical \\
        --options vae=None vae=madebyollin/taesd

Each of `--options` is a list of NAME=VALUE with commas: options of `DiffusionExtractor`, and fields of its `Weights`
and `Runtime`. The first one is what the others are compared with. A pass over all images is measured for each of them,
in turn, `--repeat` times after one that is not counted; `ms/image` is the median, and the ratio is that of the passes
of one turn, their median. On a busy CPU `cpu ms` and its ratio, of the time that the process was given, say more.

The cosine is that of activations with those of the first options: of the vectors of each cell, averaged over cells and
images. Without images, one of smooth noise is used; the weights of `--random` are no measure of accuracy.
"""

import argparse
import ast
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffseg.benchmarking import machine, table_head, timed
from diffseg.command_line import parse_timestep
from diffseg.devices import default_device
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import read_image
from diffseg.diffusion.layer_sets import expand
from diffseg.diffusion.loading import load_config, meta_network
from diffseg.diffusion.options import group_options
from diffseg.diffusion.placeholders import placeholder_conditioning
from diffseg.diffusion.sites import sites
from diffseg.feature_files import find_images

COLUMNS = 'options', 'dtype', 'ms/image', 'ratio', 'cpu ms', 'ratio of cpu', 'lowest cosine', 'mean cosine', 'lowest is'


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='?', type=Path, help='a folder (searched in depth), a list, or one image')
    parser.add_argument('--model', required=True, help='preset, hub id, diffusers folder or checkpoint file')
    parser.add_argument('--random', action='store_true', help='random weights: read none')
    parser.add_argument('--layers', nargs='+', default=['practical'], help='names, aliases, patterns or set names')
    parser.add_argument('--timesteps', nargs='+', type=parse_timestep, default=[50])
    parser.add_argument('--size', type=int, default=512, help='side of the images, pixels (default: %(default)s)')
    parser.add_argument('--count', type=int, default=1, help='images that are used (default: %(default)s)')
    parser.add_argument('--options', nargs='+', required=True, metavar='NAME=VALUE,...', help='two or more')
    parser.add_argument('--repeat', type=int, default=3, help='passes over the images (default: %(default)s)')
    parser.add_argument('--device', default=default_device())
    args = parser.parse_args(argv)
    if len(args.options) < 2:
        parser.error('--options takes two or more, to be compared')
    return args


def parse_options(text: str) -> dict[str, Any]:
    """Options from NAME=VALUE,...; values are Python's literals, or strings.

    Raises:
        ValueError: A part has no `=`.
    """
    options = {}
    for part in text.split(','):
        name, equals, value = part.partition('=')
        if not equals:
            raise ValueError(f'{part!r} in --options is not NAME=VALUE')
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def build(args: argparse.Namespace, options: Mapping[str, Any]) -> DiffusionExtractor:
    network, config = meta_network(args.model), load_config(args.model)
    defaults: dict[str, Any] = {'device': args.device}
    if args.random:
        parts = (config.part,) if config.pixel_space else (config.part, 'vae')
        defaults |= {'prompt': placeholder_conditioning(config.network), 'random': parts}
    layers = expand(args.layers, sites(network))
    return DiffusionExtractor(args.model, layers, args.timesteps, **group_options({**defaults, **options})).to(
        args.device
    )


def read(args: argparse.Namespace) -> list[Tensor]:
    """Images (1, 3, S, S)."""
    if args.images is None:
        noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return [F.interpolate(noise, (args.size, args.size), mode='bilinear')]
    items, *_ = find_images(args.images)
    return [read_image(item.path, (args.size, args.size))[None] for item in items[: args.count]]


def cosines(activations: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean cosine over the cells of each activation (B, T, C, h, w)."""
    pairs = {name: (x.double(), expected[name].double()) for name, x in activations.items()}
    return {name: torch.cosine_similarity(a, b, dim=2).mean().item() for name, (a, b) in pairs.items()}


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    images = [image.to(args.device) for image in read(args)]
    extractors = {text: build(args, parse_options(text)) for text in args.options}
    wall: dict[str, list[float]] = {text: [] for text in args.options}
    cpu: dict[str, list[float]] = {text: [] for text in args.options}
    agreement: dict[str, list[dict[str, float]]] = {text: [] for text in args.options}
    for image in images:
        expected = None
        for text, extractor in extractors.items():
            activations = extractor(image)
            expected = activations if expected is None else expected
            agreement[text].append(cosines(activations, expected))
    for _ in range(args.repeat):
        for text, extractor in extractors.items():
            start = time.process_time()
            wall[text].append(timed(lambda extractor=extractor: [extractor(image) for image in images], args.device))
            cpu[text].append(time.process_time() - start)
    model = f'{args.model}{", random weights" * args.random}'
    sys.stdout.write(f'{model}; {machine(args.device)}\n\n{table_head(COLUMNS)}\n')
    first = args.options[0]
    for text, extractor in extractors.items():
        row = [text, extractor.fingerprint['dtype']]
        for seconds in (wall, cpu):
            ratio = statistics.median(a / b for a, b in zip(seconds[first], seconds[text], strict=True))
            row += [f'{1000 * statistics.median(seconds[text]) / len(images):.0f}', f'{ratio:.2f}']
        mean = {name: statistics.fmean(x[name] for x in agreement[text]) for name in extractor.layers}
        lowest = min(mean, key=mean.__getitem__)
        row += [f'{mean[lowest]:.5f}', f'{statistics.fmean(mean.values()):.5f}', lowest]
        sys.stdout.write(f'| {" | ".join(row)} |\n')


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError, FloatingPointError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    raise SystemExit(main())

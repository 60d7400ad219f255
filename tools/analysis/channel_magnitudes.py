"""Print which channels of activations are far larger than the others, and how much.

    python tools/analysis/channel_magnitudes.py photos/ --model flux-dev --layers 'vit-block*-in' --timesteps 260

A few channels of a transformer's raw features hold massive activations, in which all places look alike (DiTF, arXiv
2505.18584, section 3). The first ones of `vit-block{i}-in` are candidates for the option `discard` when
`vit-block{i}-mod` is read. A channel's magnitude is its mean absolute value over images and cells; it is printed in
multiples of the median channel's.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffseg.command_line import parse_timestep
from diffseg.devices import default_device
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import list_images, read_image
from diffseg.diffusion.layer_sets import expand
from diffseg.diffusion.loading import meta_network
from diffseg.diffusion.sites import sites


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='+', type=Path, help='image files, or folders of them')
    parser.add_argument('--model', required=True, help='preset, hub id or diffusers folder')
    parser.add_argument('--layers', nargs='+', required=True, help='layer names, aliases, patterns or set names')
    parser.add_argument('--timesteps', nargs='+', type=parse_timestep, required=True)
    parser.add_argument('--size', type=int, help='resize images to SIZE x SIZE (default: as they are)')
    parser.add_argument('--prompt', default='')
    parser.add_argument('--channels', type=int, default=4, help='how many of the largest to print (default: 4)')
    parser.add_argument('--device', default=default_device())
    args = parser.parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    layers = expand(args.layers, sites(meta_network(args.model)))
    extractor = DiffusionExtractor(args.model, layers, args.timesteps, prompt=args.prompt).to(args.device)
    images = [read_image(path, args.size and (args.size, args.size)) for path in list_images(args.images)]
    with torch.inference_mode():
        magnitudes = [
            {layer: x[0].abs().mean(dim=(2, 3)) for layer, x in extractor(image[None].to(args.device)).items()}
            for image in images
        ]
    width = max(map(len, layers))
    print(f'{"activation":{width}}     t  channel x median, largest first')
    for layer in layers:
        means = torch.stack([image[layer] for image in magnitudes]).mean(dim=0)  # (T, C)
        for timestep, ratios in zip(args.timesteps, ratios_to_median(means), strict=True):
            largest = ratios.topk(min(args.channels, len(ratios)))
            pairs = zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
            text = '  '.join(f'{channel} x {ratio:.1f}' for channel, ratio in pairs)
            print(f'{layer:{width}} {timestep:>5}  {text}')


def ratios_to_median(means: Tensor) -> Tensor:
    """Magnitudes (T, C) as multiples of the median channel's."""
    return means / means.median(dim=1, keepdim=True).values


if __name__ == '__main__':
    raise SystemExit(main())

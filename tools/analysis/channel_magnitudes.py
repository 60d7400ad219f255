"""Print which channels of activations are far larger than the others, how much, and on which share of the images.

    python tools/analysis/channel_magnitudes.py photos/ --model flux-dev --layers 'vit-block*-in' --timesteps 260
    python tools/analysis/channel_magnitudes.py photos/ --config CONFIG --out OTHER.py

A few channels of a transformer's raw features hold massive activations, in which all places look alike (DiTF, arXiv
2505.18584, section 3). The first ones of `vit-block{i}-in` are candidates for the option `discard` when
`vit-block{i}-mod` is read. A channel's magnitude is its mean absolute value over the cells of an image; printed are its
multiple of the median channel's, averaged over images, and the share of images on which it exceeds `--times`.

Of a config, the raw features of its backbone's `-mod` layers are read. With `--out`, a config that inherits it is
written, which discards the channels that are massive on at least half of the images in any of them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config

from diffseg.command_line import parse_timestep
from diffseg.devices import default_device
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import list_images, read_image
from diffseg.diffusion.layer_sets import expand, split_timesteps
from diffseg.diffusion.loading import meta_network
from diffseg.diffusion.sites import sites
from diffseg.massive_channels import channel_magnitudes, raw_layers, write_discarding_config


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='+', type=Path, help='image files, or folders of them')
    parser.add_argument('--model', help='preset, hub id or diffusers folder')
    parser.add_argument('--config', type=Path, help='config of a DiffusionBackbone, for what is not given')
    parser.add_argument('--layers', nargs='+', help='layer names, aliases, patterns or set names')
    parser.add_argument('--timesteps', nargs='+', type=parse_timestep)
    parser.add_argument('--size', type=int, help='resize images to SIZE x SIZE (default: as they are)')
    parser.add_argument('--prompt')
    parser.add_argument('--channels', type=int, default=4, help='how many of the largest to print (default: 4)')
    parser.add_argument('--times', type=float, default=10, help='multiple of the median (default: 10)')
    parser.add_argument('--out', type=Path, help='write a config with the massive channels of CONFIG discarded')
    parser.add_argument('--device', default=default_device())
    args = parser.parse_args(argv)
    if args.config is None and (args.out or None in (args.model, args.layers, args.timesteps)):
        parser.error('give --config, or --model, --layers and --timesteps without --out')
    try:
        run(args)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    if args.config is not None:
        complete(args)
    layers = expand(args.layers, sites(meta_network(args.model)))
    extractor = DiffusionExtractor(
        args.model, layers, args.timesteps, prompt=args.prompt or '', runtime={'device': args.device}
    ).to(args.device)
    images = [read_image(path, args.size and (args.size, args.size)) for path in list_images(args.images)]
    with torch.inference_mode():
        magnitudes = [
            {layer: x[0].abs().mean(dim=(2, 3)) for layer, x in extractor(image[None].to(args.device)).items()}
            for image in images
        ]
    width = max(map(len, layers))
    print(f'{"activation":{width}}     t  channel x median (share above {args.times:g} x), largest first')
    discard = set()
    for layer in layers:
        by_image = torch.stack([image[layer] for image in magnitudes])  # (N, T, C)
        for i, timestep in enumerate(args.timesteps):
            channels = channel_magnitudes(by_image[:, i], args.times)
            discard |= {channel for channel, _, share in channels if share >= 0.5}
            largest = [f'{channel} x {times:.1f} ({share:.0%})' for channel, times, share in channels[: args.channels]]
            print(f'{layer:{width}} {timestep:>5}  {"  ".join(largest)}')
    if args.out is not None:
        if not discard:
            raise ValueError(f'no channel exceeds {args.times:g} x the median on half of the images; lower --times')
        write_discarding_config(args.out, args.config, sorted(discard))
        print(f'{args.out} discards {", ".join(map(str, sorted(discard)))}')


def complete(args: argparse.Namespace) -> None:
    """Add what is not given: model, raw layers, timesteps and a prompt of words from the config."""
    backbone = Config.fromfile(args.config).get('model', {}).get('backbone', {})
    if backbone.get('type') != 'DiffusionBackbone':
        raise ValueError(f'model.backbone of {args.config} is no DiffusionBackbone; give --model and --layers')
    _, timesteps = split_timesteps(backbone['layers'], backbone.get('timesteps'))
    prompt = backbone.get('prompt', '')
    args.model, args.layers = args.model or backbone['model'], args.layers or raw_layers(backbone)
    args.timesteps = args.timesteps or list(timesteps)
    args.prompt = prompt if args.prompt is None and isinstance(prompt, str) else args.prompt


if __name__ == '__main__':
    raise SystemExit(main())

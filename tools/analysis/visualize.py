"""Draw the principal components of chosen layers as a grid: a row for each image, a column for each layer.

    python tools/analysis/visualize.py a.jpg b.jpg --model sd15 --layers practical --timesteps 50 --out pca.png

The components of a layer are those of all images together, so that a colour means the same in each of them;
`--separate` computes those of every image separately. With several timesteps each layer has a column for each of them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from diffseg.command_line import add_dtype_argument, add_transformer_arguments, add_vae_argument, parse_timestep
from diffseg.devices import default_device
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import list_images, read_image
from diffseg.diffusion.layer_sets import expand
from diffseg.diffusion.loading import meta_network
from diffseg.diffusion.sites import sites
from diffseg.visualization import grid, pca_rgb, to_picture


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='+', type=Path, help='image files, or folders of them')
    parser.add_argument('--model', required=True, help='preset, hub id, diffusers folder or checkpoint file')
    add_vae_argument(parser)
    parser.add_argument('--layers', nargs='+', required=True, help='layer names, aliases, patterns or set names')
    parser.add_argument('--timesteps', nargs='+', type=parse_timestep, required=True)
    parser.add_argument('--out', type=Path, required=True, help='the PNG to write')
    parser.add_argument('--size', nargs='+', type=int, help="resize to S x S or H x W (default: each image's own size)")
    parser.add_argument('--prompt', default='')
    parser.add_argument('--ensemble', type=int, default=1, help='noises averaged')
    add_transformer_arguments(parser)
    parser.add_argument('--seed', type=int, default=0)
    add_dtype_argument(parser)
    parser.add_argument('--device', default=default_device())
    parser.add_argument('--cell', type=int, default=192, help='longer side of a picture in the grid, pixels')
    parser.add_argument('--smooth', action='store_true', help='enlarge maps bilinearly instead of showing their cells')
    parser.add_argument('--separate', action='store_true', help='compute the components of each image separately')
    args = parser.parse_args(argv)
    if args.size and len(args.size) > 2:
        parser.error('--size takes one number or two')
    args.size = tuple(args.size * 2)[:2] if args.size else None
    return args


def run(args: argparse.Namespace) -> None:
    paths = list_images(args.images)
    images = [read_image(path, args.size) for path in paths]
    layers = expand(args.layers, sites(meta_network(args.model)))
    extractor = DiffusionExtractor(
        args.model,
        layers,
        args.timesteps,
        prompt=args.prompt,
        ensemble=args.ensemble,
        seed=args.seed,
        discard=args.discard,
        embedded_guidance=args.embedded_guidance,
        dtype=args.dtype,
        weights={'vae': args.vae},
        runtime={'device': args.device},
    ).to(args.device)
    rows = [[to_picture(image)] for image in images]
    with torch.inference_mode():
        activations = [extractor(image[None].to(args.device)) for image in images]  # not as a batch: sizes may differ
    columns = ['image']
    for layer in layers:
        for step, timestep in enumerate(args.timesteps):
            maps = [image_activations[layer][0, step] for image_activations in activations]  # (C, h, w) of each image
            pictures = [pca_rgb([activation])[0] for activation in maps] if args.separate else pca_rgb(maps)
            for row, picture in zip(rows, pictures, strict=True):
                row.append(picture)
            columns.append(f'{layer} t={timestep}')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, [path.name for path in paths], columns, args.cell, args.smooth).save(args.out, 'PNG')
    print(f'{len(rows)} images x {len(columns) - 1} maps: {args.out}')


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    raise SystemExit(main())

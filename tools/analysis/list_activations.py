"""List the activations of a model's UNet: names, channels, strides and sizes. Weights are not read.

    python tools/analysis/list_activations.py sdxl --filter 'up-*-cross-q'
    python tools/analysis/list_activations.py demo/tiny-sd --size 64
    python tools/analysis/list_activations.py configs/segmentation/CONFIG.py

For a config, the output of its DiffusionBackbone: one map for each layer, with the channels of its timesteps
concatenated, and the list to copy into the `in_channels` of a neck or head. Attention maps have one channel for each
key: the tokens of the prompt, or the cells of the map itself.
"""

import argparse
import sys
from collections.abc import Sequence

from diffseg.command_line import parse_size
from diffseg.diffusion.layer_sets import expand, split_timesteps
from diffseg.diffusion.sites import Site
from diffseg.inspection import available_sites, backbone_configs, backbone_maps


def print_table(chosen: Sequence[Site], size: tuple[int, int]) -> None:
    channels = ['keys' if site.channels is None else str(site.channels) for site in chosen]
    rows = [('name', 'channels', 'stride', f'size at {size[0]}x{size[1]}')]
    for site, count in zip(chosen, channels, strict=True):
        rows.append((site.name, count, str(site.stride), 'x'.join(map(str, site.size(*size)))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *values in rows:
        print(name.ljust(widths[0]), *map(str.rjust, values, widths[1:]), sep='  ')


def print_model(model: str, pattern: str, size: tuple[int, int] | None) -> None:
    available, trained = available_sites(model)
    print_table([available[name] for name in expand([pattern], available)], size or trained)


def print_config(path: str, pattern: str, size: tuple[int, int] | None) -> None:
    from mmengine.config import Config  # imported here, so that models can be listed without the mm packages

    backbones = list(backbone_configs(Config.fromfile(path, import_custom_modules=False).get('model')))
    if not backbones:
        raise ValueError(f'{path}: no DiffusionBackbone in the model')
    for backbone in backbones:
        available, trained = available_sites(backbone['model'], revision=backbone.get('revision'))
        maps = {site.name: site for site in backbone_maps(backbone, available)}
        chosen = [maps[name] for name in expand([pattern], maps)]
        resized = backbone.get('input_size')
        resized = (resized, resized) if isinstance(resized, int) else resized
        timesteps = split_timesteps(backbone['layers'], backbone.get('timesteps'))[1]
        print(f'{backbone["model"]}, {len(maps)} maps, timesteps {", ".join(map(str, timesteps))}')
        print_table(chosen, size or resized or trained)
        if all(site.channels for site in chosen):
            print(f'in_channels={[site.channels for site in chosen]}')


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='preset, hub id, diffusers folder, checkpoint file, or a config (.py)')
    parser.add_argument('--filter', default='*', help='pattern, alias or set of layers, such as "up-*-res-out"')
    parser.add_argument('--size', type=parse_size, metavar='H[xW]', help="of the image (default: the model's own)")
    args = parser.parse_args(argv)
    try:
        (print_config if args.model.endswith('.py') else print_model)(args.model, args.filter, args.size)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    raise SystemExit(main())

"""List what can be read inside a model's UNet: names, channels, strides and sizes. Weights are not read.

    python tools/list_activations.py sdxl --filter 'up-*-cross-q'
    python tools/list_activations.py demo/tiny-sd --size 64
    python tools/list_activations.py configs/segmentation/CONFIG.py

For a config, what its DiffusionBackbone gives: one map for each chosen layer, with the channels of its timesteps one
after another, and the list to copy into the `in_channels` of a neck or head. Attention maps have one channel for each
key: the tokens of the prompt, or the cells of the map itself.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffseg.diffusion.layer_sets import Reading, expand, split_timesteps
from diffseg.diffusion.loading import load_config, meta_unet
from diffseg.diffusion.sites import Site, aggregates, default_scale_factor, resolve, sites


def parse_size(text: str) -> tuple[int, int]:
    """Turn '512' into (512, 512) and '512x768' into (512, 768)."""
    height, _, width = text.partition('x')
    return int(height), int(width or height)


def available_sites(model: str, revision: str | None = None) -> tuple[dict[str, Site], tuple[int, int]]:
    """All sites of a model, and the image size that it was trained on."""
    config = load_config(model, revision=revision)
    unet = meta_unet(model, revision=revision)
    factor = 2 ** (len(config.vae['block_out_channels']) - 1) if config.vae else default_scale_factor(unet)
    side = config.unet['sample_size'] * factor
    return sites(unet, factor), (side, side)


def backbones(config: Any) -> Iterator[dict[str, Any]]:
    """Every DiffusionBackbone in a config, however deep."""
    if isinstance(config, dict):
        if config.get('type') == 'DiffusionBackbone':
            yield config
        else:
            for value in config.values():
                yield from backbones(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from backbones(value)


def maps(backbone: Mapping[str, Any], available: Mapping[str, Site]) -> list[Site]:
    """What a DiffusionBackbone gives: for each map its name, stride, and channels of all its timesteps."""
    categories, mode = backbone.get('attention_maps', ()), backbone.get('attention_mode', 'concat')
    tokens = count_tokens(backbone.get('conditioner', {}))
    attention = {site.name: site for site, _ in aggregates(available, categories, mode, tokens)}
    available = {**available, **attention}
    readings, every = split_timesteps(backbone['layers'], backbone.get('timesteps'))
    readings = [Reading(*resolve([layer], available), own) for layer, own in readings]
    readings += [Reading(name, every) for name in attention if name not in dict(readings)]
    found = []
    for reading in readings:
        site = available[reading.layer]
        channels = site.channels and site.channels * len(reading.timesteps)
        found.append(replace(site, name=reading.label(every), channels=channels))
    return found


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


def count_tokens(conditioner: Mapping[str, Any]) -> int | None:
    """How many tokens a conditioner has; None for a prompt, whose tokens are not counted here."""
    from diffseg.models.backbones.conditioners import class_names

    if 'dataset' in conditioner:
        return len(class_names(conditioner['dataset']))
    return conditioner.get('num_prompts') or len(conditioner.get('classes', ())) or None


def print_config(path: str, pattern: str, size: tuple[int, int] | None) -> None:
    from mmengine.config import Config  # only here, so that the rest works without the mm packages

    found = list(backbones(Config.fromfile(path, import_custom_modules=False).get('model')))
    if not found:
        raise ValueError(f'{path}: no DiffusionBackbone in the model')
    for backbone in found:
        available, trained = available_sites(backbone['model'], revision=backbone.get('revision'))
        given = {site.name: site for site in maps(backbone, available)}
        chosen = [given[name] for name in expand([pattern], given)]
        resized = backbone.get('input_size')
        resized = (resized, resized) if isinstance(resized, int) else resized
        timesteps = split_timesteps(backbone['layers'], backbone.get('timesteps'))[1]
        print(f'{backbone["model"]}, {len(given)} maps, timesteps {", ".join(map(str, timesteps))}')
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

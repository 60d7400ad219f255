"""Write the activations of many images to disk, one safetensors file for each image.

    python tools/extract_features.py photos --model sd15 --layers practical --timesteps 50 --size 512 --out features

`photos/a/b.jpg` becomes `features/a/b.jpg.safetensors`: a tensor (T, C, h, w) for each layer, and in the header where
it comes from. The extension stays in the name, so that `b.jpg` and `b.png` do not collide. `features/config.json`
records the configuration, and a run with another one is refused there.

An interrupted run continues where it stopped: a file gets its name only when it is complete. Several runs can share the
work with `--shard 0/4` ... `--shard 3/4`. Images that cannot be used are listed at the end, and the exit status is then
1; all others are processed. EXIF orientation is applied (see `diffseg.diffusion.images.read_image`).
"""

import argparse
import collections
import itertools
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from diffseg.command_line import add_dtype_argument, add_vae_argument, parse_timestep
from diffseg.devices import default_device
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import image_size, read_pixels, scale_pixels
from diffseg.diffusion.layer_sets import expand
from diffseg.diffusion.loading import load_config
from diffseg.diffusion.placeholders import placeholder_conditioning
from diffseg.diffusion.sites import Site
from diffseg.feature_files import (
    DTYPES,
    Item,
    check_configuration,
    count_suffixes,
    features_to_bytes,
    find_images,
    header,
    is_complete,
)
from diffseg.files import locate, write_bytes
from diffseg.inspection import available_sites

HEADER = 2**16  # bytes of an image to read for its size


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('input', help='a folder (searched in depth), a .txt file of paths, or one image')
    parser.add_argument('--model', required=True, help='preset, hub id, diffusers folder or checkpoint file')
    add_vae_argument(parser)
    parser.add_argument('--layers', nargs='+', required=True, help='layer names, aliases, patterns or set names')
    parser.add_argument('--timesteps', nargs='+', type=parse_timestep, required=True)
    parser.add_argument('--out', required=True)
    parser.add_argument('--root', help="names are relative to it (default: the input's folder)")
    parser.add_argument('--size', nargs='+', type=int, help="resize to S x S or H x W (default: each image's own size)")
    parser.add_argument('--prompt', default='')
    parser.add_argument('--trajectory', default='noise', choices=('noise', 'clean', 'inversion'))
    parser.add_argument('--ensemble', type=int, default=1, help='noises averaged')
    parser.add_argument('--seed', type=int, default=0)
    add_dtype_argument(parser)
    parser.add_argument('--save-dtype', choices=DTYPES, default='float16', help='to store')
    parser.add_argument('--batch', type=int, default=1, help='images of one size in one forward pass')
    parser.add_argument('--device', default=default_device())
    parser.add_argument('--shard', default='0/1', metavar='I/N', help='do the I-th of N parts, 0 <= I < N')
    parser.add_argument('--dry-run', action='store_true', help='only print what would be written')
    args = parser.parse_args(argv)
    if args.size and len(args.size) > 2:
        parser.error('--size takes one number or two')
    args.size = tuple(args.size * 2)[:2] if args.size else None
    if args.batch < 1:
        parser.error('--batch must be at least 1')
    try:
        index, count = map(int, args.shard.split('/'))
    except ValueError:
        parser.error(f'--shard must look like 0/4, got {args.shard!r}')
    if not 0 <= index < count:
        parser.error(f'--shard counts from 0, up to {count - 1}/{count}; got {args.shard}')
    args.shard = index, count
    return args


def estimate(
    items: Sequence[Item],
    size: tuple[int, int] | None,
    chosen: Sequence[Site],
    timesteps: int,
    itemsize: int,
    tokens: int,
) -> int:
    """Bytes of the activations of `items` for prompts of `tokens`; images without a readable header are not counted."""
    total = 0
    for (height, width), count in _sizes(items, size).items():
        values = 0
        for site in chosen:
            cells = math.prod(site.size(height, width))
            channels = site.channels or (cells if site.name.endswith('self-map') else tokens)
            values += channels * cells
        total += count * values * timesteps * itemsize
    return total


def _sizes(items: Sequence[Item], size: tuple[int, int] | None) -> collections.Counter[tuple[int, int]]:
    sizes: collections.Counter[tuple[int, int]] = collections.Counter()
    for item in items:
        try:
            sizes[size or _header_size(item)] += 1
        except (OSError, ValueError):
            continue  # reported when the image is processed
    return sizes


def _header_size(item: Item) -> tuple[int, int]:
    with item.fs.open(item.path, 'rb', block_size=HEADER) as file:
        return image_size(file)


def batches(
    items: Sequence[Item], size: tuple[int, int] | None, length: int, failures: dict[str, str], bar: tqdm
) -> Iterator[tuple[list[Item], Tensor]]:
    """Read images and batch consecutive ones of one size; errors of unreadable images go to `failures`."""

    def read() -> Iterator[tuple[Item, Tensor]]:
        for item in items:
            try:
                yield item, scale_pixels(read_pixels(item.path, size, item.content()))
            except (OSError, ValueError) as error:
                failures[item.name] = str(error)
                bar.update()

    for _, group in itertools.groupby(read(), key=lambda pair: pair[1].shape):
        while part := list(itertools.islice(group, length)):
            yield [item for item, _ in part], torch.stack([image for _, image in part])  # (B, 3, H, W)


def extract(
    extractor: DiffusionExtractor, members: Sequence[Item], images: Tensor, dtype: torch.dtype
) -> Iterator[tuple[Item, dict[str, Tensor] | Exception]]:
    """Yield each image's {layer: (T, C, h, w)}; if a batch fails, its images are run one by one."""
    try:
        activations = {name: value.to(dtype).cpu() for name, value in extractor(images).items()}  # (B, T, C, h, w)
        for name, value in activations.items():
            if not value.isfinite().all():
                raise ValueError(f'{name} does not fit {dtype}; store it with --save-dtype float32')
    except (ValueError, FloatingPointError) as error:
        if len(members) == 1:
            yield members[0], error
        else:
            for i, item in enumerate(members):
                yield from extract(extractor, [item], images[i : i + 1], dtype)
        return
    for i, item in enumerate(members):
        yield item, {name: value[i].contiguous() for name, value in activations.items()}


def run(args: argparse.Namespace) -> int:
    items, others, root = find_images(args.input, args.root)
    store, folder = locate(args.out)
    index, count = args.shard
    items = items[index::count]
    if others:
        print(f'skipping {count_suffixes(others)}')

    available, _ = available_sites(args.model)
    layers = expand(args.layers, available)
    todo = [item for item in items if not store.exists(item.output(folder))]
    itemsize = DTYPES[args.save_dtype].itemsize
    tokens = placeholder_conditioning(load_config(args.model).network).tokens
    needed = estimate(todo, args.size, [available[name] for name in layers], len(args.timesteps), itemsize, tokens)
    free = _free(store, folder)
    print(
        f'{len(items)} images, {len(layers)} layers x {len(args.timesteps)} timesteps; {len(todo)} to write: '
        f'{_bytes(needed)} in {args.save_dtype}' + ('' if free is None else f', {_bytes(free)} free at {args.out}')
    )
    if free is not None and needed > free:
        raise ValueError(f'not enough space at {args.out}: {_bytes(needed)} are needed, {_bytes(free)} are free')
    if args.dry_run:
        return 0

    extractor = DiffusionExtractor(
        args.model,
        layers,
        args.timesteps,
        trajectory=args.trajectory,
        prompt=args.prompt,
        ensemble=args.ensemble,
        seed=args.seed,
        dtype=args.dtype,
        weights={'vae': args.vae},
        runtime={'device': args.device},
    ).to(args.device)
    configuration = {
        **extractor.fingerprint,
        'size': args.size,
        'save_dtype': args.save_dtype,
        'root': root,
    }
    check_configuration(args.out, configuration)

    failures: dict[str, str] = {}
    headers: dict[str, dict[str, str]] = {}
    todo = []
    for item in items:
        try:
            headers[item.name] = header(item, configuration)
        except OSError as error:
            failures[item.name] = str(error)
        else:
            if not is_complete(store, item.output(folder), headers[item.name]):
                todo.append(item)
    finished = len(headers) - len(todo)
    with tqdm(total=len(headers), initial=finished, unit='image', disable=None) as bar:
        for members, images in batches(todo, args.size, args.batch, failures, bar):
            with torch.inference_mode():
                for item, result in extract(extractor, members, images.to(args.device), DTYPES[args.save_dtype]):
                    if isinstance(result, Exception):
                        failures[item.name] = str(result)
                    else:
                        size = 'x'.join(map(str, images.shape[2:]))
                        data = features_to_bytes(result, headers[item.name] | {'input_size': size})
                        write_bytes(store, item.output(folder), data)
                    bar.update()
    print(f'{len(items) - finished - len(failures)} written, {finished} already there, {len(failures)} failed')
    for name, reason in failures.items():
        print(f'failed: {name}: {reason}', file=sys.stderr)
    return 1 if failures else 0


def _free(store: AbstractFileSystem, folder: str) -> int | None:
    """Bytes that fit there; None where there is no such limit."""
    if not isinstance(store, LocalFileSystem):
        return None
    existing = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
    return shutil.disk_usage(existing).free


def _bytes(count: float) -> str:
    for unit in ('B', 'kB', 'MB', 'GB'):
        if count < 1000:
            return f'{count:.3g} {unit}'
        count /= 1000
    return f'{count:.3g} TB'


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return run(args)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    raise SystemExit(main())

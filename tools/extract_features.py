"""Write the activations of many images to disk, one safetensors file for each image.

    python tools/extract_features.py photos --model sd15 --layers practical --timesteps 50 --size 512 --out features

`photos/a/b.jpg` becomes `features/a/b.jpg.safetensors`: a tensor (T, C, h, w) for each layer, and in the header where
it comes from. The extension stays in the name, so that `b.jpg` and `b.png` do not collide. `features/config.json`
records the configuration, and a run with another one is refused there.

An interrupted run continues where it stopped: a file gets its name only when it is complete. Several runs can share the
work with `--shard 0/4` ... `--shard 3/4`. Images that cannot be used, and those whose file cannot be written, are
listed at the end, and the exit status is then 1; all others are processed. EXIF orientation is applied (see
`diffseg.diffusion.images.open_image`).

Images and features may be behind any URL of fsspec: `s3://bucket/photos` (with the package `s3fs`),
`zip://photos::photos.zip`, ... With `--batch`, images of one size share a forward pass, wherever they are in the
folder. Images are decoded by other processes (`--workers`) and files are written by threads, while the device computes.

`--engine ray` does the same on a cluster of Ray (`pip install 'diffseg[ray]'`). It reads tar and Parquet files as well,
and writes such shards, see `diffseg.feature_shards`.
"""

import argparse
import collections
import math
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from tqdm import tqdm

from diffseg.command_line import add_dtype_argument, add_transformer_arguments, add_vae_argument, parse_timestep
from diffseg.devices import default_device
from diffseg.diffusion.images import SUFFIXES, image_size
from diffseg.diffusion.layer_sets import expand
from diffseg.diffusion.loading import load_config
from diffseg.diffusion.placeholders import placeholder_conditioning
from diffseg.diffusion.sites import Site
from diffseg.feature_extraction import WORKERS, default_workers, extract_features, make_extractor, start_fork_server
from diffseg.feature_files import (
    DTYPES,
    Item,
    check_configuration,
    count_suffixes,
    find_images,
    header,
    is_complete,
)
from diffseg.feature_shards import FORMATS, SHARDS, list_features, list_files
from diffseg.files import locate, remove_abandoned
from diffseg.inspection import available_sites

HEADER = 2**16  # bytes of an image to read for its size
OPTIONS = {  # of one engine alone
    'local': ('workers', 'shard', 'dry_run'),
    'ray': ('address', 'format', 'image_column', 'actors', 'actor_cpus'),
}
READERS = 16  # threads that look at files, most of whose time is the latency of a remote store
IMPORTED = ('diffseg.diffusion.extractor', 'diffseg.inspection')  # by this file, which workers run


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
    add_transformer_arguments(parser)
    parser.add_argument('--seed', type=int, default=0)
    add_dtype_argument(parser)
    parser.add_argument('--save-dtype', choices=DTYPES, default='float16', help='to store')
    parser.add_argument('--batch', type=int, default=1, help='images of one size in one forward pass')
    parser.add_argument('--device', help='default: the accelerator, or the CPU where there is none')
    parser.add_argument(
        '--workers',
        type=int,
        help=f'processes that decode (default: none for a CPU or few images; else half of the cores, up to {WORKERS})',
    )
    parser.add_argument('--shard', default='0/1', metavar='I/N', help='do the I-th of N parts, 0 <= I < N')
    parser.add_argument('--dry-run', action='store_true', help='only print what would be written')
    parser.add_argument('--engine', choices=('local', 'ray'), default='local', help='this process, or a cluster of Ray')
    on_ray = parser.add_argument_group('with --engine ray')
    on_ray.add_argument(
        '--address', help='of a cluster: HOST:PORT or auto (default: RAY_ADDRESS, or this machine alone)'
    )
    on_ray.add_argument('--format', choices=FORMATS, default='webdataset', help='of the shards that are written')
    on_ray.add_argument('--image-column', default='image', help='of Parquet files (default: %(default)s)')
    on_ray.add_argument('--actors', type=int, help='each holds an extractor (default: one for each GPU, or else CPU)')
    on_ray.add_argument('--actor-cpus', type=int, default=1, help='CPUs of an actor (default: %(default)s)')
    args = parser.parse_args(argv)
    for engine, names in OPTIONS.items():
        for name in names if engine != args.engine else ():
            if getattr(args, name) != parser.get_default(name):
                parser.error(f'--{name.replace("_", "-")} is an option of --engine {engine}')
    for name in ('actors', 'actor_cpus'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} is {getattr(args, name)}; it must be at least 1')
    if args.size and len(args.size) > 2:
        parser.error('--size takes one number or two')
    args.size = tuple(args.size * 2)[:2] if args.size else None
    if args.batch < 1:
        parser.error(f'--batch is {args.batch}; it must be at least 1')
    if args.workers is not None and args.workers < 0:
        parser.error(f'--workers is {args.workers}; it is a number of processes, or 0')
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


def _sizes(items: Sequence[Item], size: tuple[int, int] | None) -> collections.Counter[tuple[int, int] | None]:
    if size is not None:
        return collections.Counter({size: len(items)})
    with ThreadPoolExecutor(READERS) as readers:
        return collections.Counter(filter(None, readers.map(_read_size, items)))


def _read_size(item: Item) -> tuple[int, int] | None:
    """Height and width; None for what is no image, which is reported when it is processed."""
    try:
        with item.fs.open(item.path, 'rb', block_size=HEADER) as file:
            return image_size(file)
    except (OSError, ValueError):
        return None


def read_headers(
    items: Sequence[Item], configuration: Mapping[str, Any]
) -> tuple[dict[Item, dict[str, str]], dict[Item, str]]:
    """Headers of the images' files, and why others cannot be read."""

    def read(item: Item) -> dict[str, str] | OSError:
        try:
            return header(item, configuration)
        except OSError as error:
            return error

    with ThreadPoolExecutor(READERS) as readers:
        headers = dict(zip(items, readers.map(read, items), strict=True))
    failures = {item: str(entry) for item, entry in headers.items() if isinstance(entry, OSError)}
    return {item: entry for item, entry in headers.items() if item not in failures}, failures


def run(args: argparse.Namespace) -> int:
    items, others, root = find_images(args.input, args.root)
    store, folder = locate(args.out)
    index, count = args.shard
    items = items[index::count]
    if others:
        print(f'skipping {count_suffixes(others)}')

    available, _ = available_sites(args.model)
    layers = expand(args.layers, available)
    existing = set(store.find(folder))
    todo = [item for item in items if item.output(folder) not in existing]
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
    device = args.device or default_device()
    workers = default_workers(len(todo), device) if args.workers is None else args.workers
    if workers:
        start_fork_server(IMPORTED)

    extractor = make_extractor(device, extractor_options(args, layers))
    configuration = {**extractor.fingerprint, **stored_as(args, root)}
    check_configuration(args.out, configuration)
    if isinstance(store, LocalFileSystem):
        remove_abandoned(existing)

    headers, failures = read_headers(items, configuration)
    with ThreadPoolExecutor(READERS) as readers:
        there = [item for item in headers if item.output(folder) in existing]
        complete = readers.map(lambda item: is_complete(store, item.output(folder), headers[item]), there)
        done = {item for item, whole in zip(there, complete, strict=True) if whole}
    todo = {item: entry for item, entry in headers.items() if item not in done}
    finished = len(done)
    options = {'size': args.size, 'dtype': DTYPES[args.save_dtype], 'batch': args.batch, 'workers': workers}
    with tqdm(total=len(headers), initial=finished, unit='image', disable=None) as bar:
        for item, failure in extract_features(extractor, todo, store, folder, **options):
            if failure is not None:
                failures[item] = failure
            bar.update()
    print(f'{len(items) - finished - len(failures)} written, {finished} already there, {len(failures)} failed')
    for item in sorted(failures, key=lambda item: item.name):
        print(f'failed: {item.name}: {failures[item]}', file=sys.stderr)
    return 1 if failures else 0


def extractor_options(args: argparse.Namespace, layers: Sequence[str]) -> dict[str, Any]:
    return {
        'model': args.model,
        'layers': layers,
        'timesteps': args.timesteps,
        'trajectory': args.trajectory,
        'prompt': args.prompt,
        'ensemble': args.ensemble,
        'seed': args.seed,
        'discard': args.discard,
        'embedded_guidance': args.embedded_guidance,
        'dtype': args.dtype,
        'weights': {'vae': args.vae},
    }


def stored_as(args: argparse.Namespace, root: str) -> dict[str, Any]:
    """What the activations of an image depend on besides the extractor."""
    return {'size': args.size, 'save_dtype': args.save_dtype, 'root': root}


def run_on_ray(args: argparse.Namespace) -> int:
    try:
        import ray

        from diffseg import ray_engine
    except ModuleNotFoundError as error:
        raise ImportError(f"--engine ray needs {error.name}: pip install 'diffseg[ray]'") from error

    items, others, root = find_images(args.input, args.root, SUFFIXES | SHARDS)
    store, folder = locate(args.out)
    if others:
        print(f'skipping {count_suffixes(others)}')
    layers = expand(args.layers, available_sites(args.model)[0])
    cluster = ray_engine.start(args.address)
    gpus = int(args.device != 'cpu' and cluster.get('GPU', 0) >= 1)
    settings = ray_engine.Settings(
        partial(make_extractor, options=extractor_options(args, layers)),
        args.device,
        args.actor_cpus,
        gpus,
        DTYPES[args.save_dtype],
        args.batch,
    )
    try:
        fingerprint, stored = ray_engine.find_fingerprint(settings), stored_as(args, root)
        check_configuration(args.out, {**fingerprint, **stored})
        if isinstance(store, LocalFileSystem):
            remove_abandoned(store.ls(folder, detail=False))
        done = list_features(args.out)
        files, failures = list_files(items, done)
        actors = args.actors or max(1, int(cluster['GPU'] if gpus else cluster['CPU'] // args.actor_cpus))
        sink = ray_engine.FeatureSink(args.out, FORMATS[args.format])
        print(f'{len(files)} files to read, {len(done)} images already there; {actors} actors')
        ray_engine.extract_files(files, items[0].fs, sink, settings, fingerprint, stored, actors, args.image_column)
    except ray.exceptions.RayError as error:
        print(f'error: {error}\nstart the run again: it goes on where it stopped', file=sys.stderr)
        return 2
    failures += sink.failures
    print(f'{sink.written} written, {len(done)} already there, {len(failures)} failed')
    for name, reason in sorted(failures):
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
    before = signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # files are finished, as by Ctrl-C
    try:
        return run_on_ray(args) if args.engine == 'ray' else run(args)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('stopped; what was written is complete, and the same command goes on from there', file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == '__main__':
    raise SystemExit(main())

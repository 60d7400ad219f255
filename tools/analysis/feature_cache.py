"""Inspect and maintain a feature cache, the folder in `cache=` of a DiffusionBackbone.

    python tools/analysis/feature_cache.py estimate CONFIG --images 20210    size to expect, without weights and data
    python tools/analysis/feature_cache.py stats FOLDER                      number and size of entries
    python tools/analysis/feature_cache.py verify FOLDER                     read every entry and compare its checksum
    python tools/analysis/feature_cache.py prune FOLDER --max-size 50GB      delete the least recently used entries
    python tools/analysis/feature_cache.py clear FOLDER                      delete all entries
    python tools/analysis/feature_cache.py benchmark CONFIG                  an epoch without cache, cold and warm

Only entries are deleted, and every command may run while a training uses the folder.

The benchmark reads, preprocesses and extracts the features of an epoch; necks and heads, whose time does not change, do
not run. The epoch is the config's training data in its pipeline, with the same random augmentations each time, or a
folder of images given with `--images`. The cache is a temporary one.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, set_random_seed
from mmseg.registry import MODELS
from torch import Tensor

from diffseg.cache import (
    DTYPES,
    DamagedEntryError,
    FeatureCache,
    build_cache,
    entry_size,
    format_size,
    read_entry,
)
from diffseg.cache import parse_size as parse_bytes
from diffseg.command_line import parse_size
from diffseg.devices import default_device
from diffseg.diffusion.images import SUFFIXES, read_image
from diffseg.diffusion.loading import load_config
from diffseg.diffusion.placeholders import placeholder_conditioning
from diffseg.inspection import available_sites, backbone_configs, backbone_maps
from diffseg.models import DiffusionBackbone


def map_shapes(config: Config, size: tuple[int, int] | None) -> list[tuple[int, int, int]]:
    """Shapes (T*C, h, w) of the maps that a config's backbones give for an image; no weights are read.

    `size` is the image's (height, width); None is what the data preprocessor pads to, else what the model was trained
    on. A backbone's `input_size` overrides it.

    Raises:
        ValueError: no DiffusionBackbone, or one with attention maps, whose number of channels is that of the keys.
    """
    backbones = list(backbone_configs(config.get('model')))
    if not backbones:
        raise ValueError(f'{config.filename}: no DiffusionBackbone in the model')
    padded = config.model.get('data_preprocessor', {}).get('size')
    shapes = []
    for backbone in backbones:
        available, trained = available_sites(backbone['model'], revision=backbone.get('revision'))
        chosen = backbone_maps(backbone, available)
        if any(site.channels is None for site in chosen):
            raise ValueError(
                'the channels of attention maps are their keys, whose number is unknown here; leave these layers out'
            )
        resized = backbone.get('input_size')
        resized = (resized, resized) if isinstance(resized, int) else resized
        height, width = resized or size or padded or trained
        shapes += [(site.channels, *site.size(height, width)) for site in chosen]
    return shapes


def estimate(args: argparse.Namespace) -> int:
    config = Config.fromfile(args.config)
    shapes = map_shapes(config, args.size)
    print(f'{len(shapes)} maps: {", ".join("x".join(map(str, shape)) for shape in shapes)}')
    print(f'| dtype | an image | {args.images} images |\n|---|---|---|')
    for dtype in DTYPES:
        size = entry_size(shapes, dtype)
        print(f'| {dtype} | {format_size(size)} | {format_size(size * args.images)} |')
    for backbone in backbone_configs(config.model):
        cache = build_cache(backbone.get('cache'))
        if cache is not None and cache.max_size is not None:
            room = cache.max_size // entry_size(shapes, cache.dtype)
            print(f'max_size={format_size(cache.max_size)} has room for {room} images in {cache.dtype}')
    return 0


def stats(args: argparse.Namespace) -> int:
    cache = FeatureCache(args.folder)
    files = [path.stat() for path in cache.entries()]
    print(f'{len(files)} entries, {format_size(cache.size())}')
    if files:
        first, last = (time.ctime(choose(stat.st_mtime for stat in files)) for choose in (min, max))
        print(f'last used between {first} and {last}')
    return 0


def verify(args: argparse.Namespace) -> int:
    """Exit status 1 if there are damaged entries, also if they are deleted."""
    count = damaged = 0
    for path in FeatureCache(args.folder).entries():
        try:
            count += 1
            read_entry(path)
        except FileNotFoundError:  # evicted in the meantime
            count -= 1
        except DamagedEntryError as error:
            damaged += 1
            print(error)
            if args.delete:
                path.unlink(missing_ok=True)
    print(f'{count} entries, {damaged} damaged{" and deleted" if damaged and args.delete else ""}')
    return 1 if damaged else 0


def prune(args: argparse.Namespace) -> int:
    cache = FeatureCache(args.folder)
    cache.prune(args.max_size)
    print(f'{cache.counts.evicted} entries deleted, {format_size(cache.size())} left')
    return 0


def benchmark(args: argparse.Namespace) -> int:
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options)
    init_default_scope('mmseg')
    backbone = build_backbone(config, args.random).to(args.device)
    load = folder_loader(args) if args.images else config_loader(config)
    images = next(iter(load()))
    with torch.no_grad():
        backbone(images[:1].to(args.device))  # warm-up
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        results = {'without': run_epoch(backbone, load, args.device)}
        backbone.cache = FeatureCache(folder, args.dtype)
        results['cold'] = run_epoch(backbone, load, args.device)
        warm = [run_epoch(backbone, load, args.device) for _ in range(args.repeat)]
        results['warm'] = tuple(map(statistics.median, zip(*warm, strict=True)))
        print(f'{torch.get_num_threads()} threads, {args.device}; {args.dtype}, {format_size(backbone.cache.size())}')
        print(f'cold and {args.repeat} warm epochs: {backbone.cache.counts}')
    print('| epoch | s | s in the backbone | times faster | backbone alone |\n|---|---|---|---|---|')
    for name, (total, inside) in results.items():
        faster = results['without'][0] / total, results['without'][1] / inside
        print(f'| {name} | {total:.3g} | {inside:.3g} | {faster[0]:.3g} | {faster[1]:.3g} |')
    return 0


def build_backbone(config: Config, random: bool) -> DiffusionBackbone:
    """The config's backbone without cache; with random weights, it gets an empty prompt that needs no text encoder."""
    options = {**config.model.backbone, 'cache': None}
    if options['type'] != 'DiffusionBackbone':
        raise ValueError(f'the backbone is a {options["type"]}; the benchmark takes a DiffusionBackbone')
    if random:
        configs = load_config(options['model'])
        options['random'] = (configs.part, 'vae')
        if not configs.pixel_space:
            options['prompt'] = placeholder_conditioning(configs.network)
    return MODELS.build(options).eval()


def folder_loader(args: argparse.Namespace) -> Callable[[], Iterable[Tensor]]:
    """A function that yields an epoch's batches (B, 3, H, W) of the images in a folder."""
    paths = sorted(path for path in args.images.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f'no images in {args.images}')

    def load() -> Iterable[Tensor]:
        for first in range(0, len(paths), args.batch):
            yield torch.stack([read_image(path, args.size) for path in paths[first : first + args.batch]])

    return load


def config_loader(config: Config) -> Callable[[], Iterable[Tensor]]:
    """A function that yields an epoch's batches (B, 3, H, W) of the config's training data, always the same."""
    preprocessor = MODELS.build(config.model.data_preprocessor)

    def load() -> Iterable[Tensor]:
        set_random_seed(0)
        loader = Runner.build_dataloader(config.train_dataloader, seed=0)
        batches = -(-len(loader.dataset) // loader.batch_size)  # the sampler may be endless
        return (preprocessor(batch, training=True)['inputs'] for batch in itertools.islice(loader, batches))

    return load


@torch.no_grad()
def run_epoch(backbone: DiffusionBackbone, load: Callable[[], Iterable[Tensor]], device: str) -> tuple[float, float]:
    """Seconds of an epoch: in total, and in the backbone."""
    batches = load()
    start, inside = time.perf_counter(), 0.0
    for images in batches:
        images = images.to(device)
        before = time.perf_counter()
        backbone(images)
        if torch.device(device).type != 'cpu':
            torch.get_device_module(device).synchronize()
        inside += time.perf_counter() - before
    return time.perf_counter() - start, inside


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(run: Callable[[argparse.Namespace], int], name: str, text: str, target: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text)
        sub.set_defaults(run=run)
        sub.add_argument(target, type=parse_folder if target == 'folder' else str)
        return sub

    sub = command(estimate, 'estimate', 'size to expect', 'config')
    sub.add_argument('--images', type=int, required=True, help='number of different inputs')
    sub.add_argument('--size', type=parse_size, metavar='H[xW]', help='of the input images of the backbone')
    command(stats, 'stats', 'number and size of entries', 'folder')
    sub = command(verify, 'verify', 'read every entry and compare its checksum', 'folder')
    sub.add_argument('--delete', action='store_true', help='delete damaged entries')
    sub = command(prune, 'prune', 'delete the least recently used entries', 'folder')
    sub.add_argument('--max-size', type=parse_limit, required=True, help='such as 50GB')
    command(prune, 'clear', 'delete all entries', 'folder').set_defaults(max_size=0)
    sub = command(benchmark, 'benchmark', 'time of an epoch without cache, cold and warm', 'config')
    sub.add_argument('--images', type=Path, help="folder of images to use instead of the config's training data")
    sub.add_argument('--size', type=parse_size, metavar='H[xW]', help='size to resize these images to')
    sub.add_argument('--batch', type=int, default=1, help='batch size of these images')
    sub.add_argument('--random', action='store_true', help='random weights: read none')
    sub.add_argument('--dtype', choices=DTYPES, default='float16', help='to store')
    sub.add_argument('--repeat', type=int, default=3, help='warm epochs, of which the median counts')
    sub.add_argument('--dir', type=Path, help='where the temporary cache is made')
    sub.add_argument('--device', default=default_device())
    sub.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE')
    return parser.parse_args(argv)


def parse_folder(text: str) -> Path:
    """The path of an existing folder: a mistyped one would look like an empty cache."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f'no folder {text}')
    return Path(text)


def parse_limit(text: str) -> int:
    """Bytes of a size such as 50GB."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from error


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return args.run(args)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    raise SystemExit(main())

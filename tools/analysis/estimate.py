"""How much extraction will cost: hours of one device and stored bytes, from counted operations and a rate.

    python tools/analysis/estimate.py --rate 100
    python tools/analysis/estimate.py --measure --settings 'SD1.5, practical layers'
    python tools/analysis/estimate.py --rate 100 --vae madebyollin/taesd
    python tools/analysis/estimate.py --rate 100 --model sdxl --size 1024 --layers dift --timesteps 261 --images 50000

Operations are floating-point operations (2 for a multiply-add) of the VAE and the network, counted on the meta device,
as in `tools/benchmark.py`. A rate is what a device sustains in extraction: `--rate` in TFLOP per second, or with
`--measure` that of each setting here, with random weights. Reading, resizing and writing of files is not in it. Hours
of several devices add up: n of them take an n-th of the time.

Bytes are those of all activations of the layers in `--save-dtype`, one file for each image; headers are not counted.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch

from diffseg.benchmarking import machine, table_head
from diffseg.cache import format_size
from diffseg.command_line import add_dtype_argument, add_vae_argument, parse_timestep
from diffseg.costs import DATASETS, SETTINGS, Setting, cost, sustained_rate
from diffseg.devices import default_device
from diffseg.feature_files import DTYPES


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rate = parser.add_mutually_exclusive_group(required=True)
    rate.add_argument('--rate', type=float, metavar='TFLOPS', help='that a device sustains')
    rate.add_argument('--measure', action='store_true', help='measure the rate of each setting on this device')
    parser.add_argument('--settings', nargs='+', choices=SETTINGS, metavar='NAME', help=f'of: {"; ".join(SETTINGS)}')
    parser.add_argument('--model', help='a setting of your own: preset, hub id, diffusers folder or checkpoint file')
    add_vae_argument(parser)
    parser.add_argument('--size', type=int, default=512, help='of --model, pixels (default: %(default)s)')
    parser.add_argument('--layers', nargs='+', default=['practical'], help='of --model (default: practical)')
    parser.add_argument('--timesteps', nargs='+', type=parse_timestep, default=[50], help='of --model (default: 50)')
    parser.add_argument('--ensemble', type=int, default=1, help='of --model (default: %(default)s)')
    parser.add_argument('--images', type=int, nargs='+', help='numbers of images, instead of those of data sets')
    parser.add_argument('--save-dtype', choices=DTYPES, default='float16', help='to store (default: %(default)s)')
    add_dtype_argument(parser)
    parser.add_argument('--memory-format', default='auto', help="with --measure: 'contiguous', 'channels_last', ...")
    parser.add_argument('--device', default=default_device())
    args = parser.parse_args(argv)
    if args.rate is not None and args.rate <= 0:
        parser.error(f'--rate is {args.rate:g}; it is a number of TFLOP per second above 0')
    if args.model is not None and args.settings is not None:
        parser.error('give either --settings or --model')
    return args


def rows(args: argparse.Namespace, settings: dict[str, Setting], images: Sequence[int]) -> Iterator[list[str]]:
    """Cells of each row of the table."""
    for name, setting in settings.items():
        one = cost(setting, args.vae)
        rate = (args.rate or 0) * 1e12
        if args.measure:
            options = {'dtype': args.dtype, 'memory_format': args.memory_format}
            rate = sustained_rate(setting, args.device, vae=args.vae, **options)
        size = one.values * DTYPES[args.save_dtype].itemsize
        cells = [name, f'{setting.size}', f'{len(setting.timesteps)}', f'{setting.ensemble}']
        cells += [f'{one.flop / 1e12:.3g}', f'{rate / 1e12:.3g}', format_size(size)]
        cells += [f'{format_time(n * one.flop / rate)}, {format_size(n * size)}' for n in images]
        yield cells


def format_time(seconds: float) -> str:
    """Hours, or for less than one minutes or seconds."""
    for unit, length in (('h', 3600), ('min', 60)):
        if seconds >= length:
            return f'{seconds / length:,.0f} {unit}' if seconds >= 100 * length else f'{seconds / length:.3g} {unit}'
    return f'{seconds:.3g} s'


def run(args: argparse.Namespace) -> None:
    if args.model is not None:
        setting = Setting(args.model, args.size, tuple(args.layers), tuple(args.timesteps), args.ensemble)
        settings = {f'{args.model}, {" ".join(args.layers)}': setting}
    else:
        settings = {name: SETTINGS[name] for name in args.settings or SETTINGS}
    images = args.images or list(DATASETS.values())
    names = [f'{n:,} images' for n in images] if args.images else [f'{name} ({n:,})' for name, n in DATASETS.items()]
    version = f'torch {torch.__version__}'
    how = f'{args.rate:g} TFLOP per second; {version}' if args.rate else f'measured: {machine(args.device)}'
    vae = f'; VAE {args.vae}' if args.vae else ''
    sys.stdout.write(f'{how}{vae}; stored in {args.save_dtype}\n\n')
    columns = ['setting', 'size', 'T', 'E', 'TFLOP/image', 'TFLOP/s', 'per image', *names]
    sys.stdout.write(f'{table_head(columns)}\n')
    for cells in rows(args, settings, images):
        sys.stdout.write(f'| {" | ".join(cells)} |\n')
        sys.stdout.flush()


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

"""How busy `tools/extract_features.py` keeps the device: images in a second, beside those of the extractor alone.

    python tools/toy/make_data.py DATA --train 500 --test 0
    python tools/analysis/benchmark_extraction.py DATA/toy/real/train --model demo/tiny-sd --batch 8

* **bare**: the extractor on batches that were decoded before; nothing is converted or stored.
* **tool**: the same batches as the tool makes and stores them, from the first image that is read to the last file, in
  this process with its workers. What the tool does before is not measured: imports, listing, loading of the model.
* **host**: the tool with a network that returns at once what it returned before: decoding, conversion, writing. On a
  CPU, that is time that the network lacks.

The first two are measured in turn, `--repeat` times after a pass of each that is not counted: medians, and all ratios.
On a busy machine the ratio of CPU time says more, if the device is the CPU; that of `--workers` is not in it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

import torch

from diffseg.benchmarking import machine, table_head, timed
from diffseg.command_line import add_dtype_argument, parse_timestep
from diffseg.devices import default_device
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.layer_sets import expand
from diffseg.diffusion.loading import load_config, meta_network
from diffseg.diffusion.placeholders import placeholder_conditioning
from diffseg.diffusion.sites import sites
from diffseg.feature_extraction import (
    batches,
    decode,
    default_workers,
    extract_features,
    start_fork_server,
    upload_pixels,
)
from diffseg.feature_files import DTYPES, find_images, header
from diffseg.files import locate

COLUMNS = tuple(
    'images|size|batch|workers|bare images/s|tool images/s|host ms/image|ratio|ratio of cpu|all ratios'.split('|')
)


class Replay(torch.nn.Module):
    """In place of an extractor: returns what that returned for images of the same shape."""

    def __init__(self, extractor: DiffusionExtractor) -> None:
        super().__init__()
        self.extractor = extractor
        self.activations: dict[torch.Size, dict[str, torch.Tensor]] = {}

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if images.shape not in self.activations:
            self.activations[images.shape] = self.extractor(images)
        return self.activations[images.shape]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', help='a folder (searched in depth), a list, or a URL of fsspec')
    parser.add_argument('--model', default='demo/tiny-sd', help='preset, hub id, diffusers folder or checkpoint file')
    parser.add_argument('--random', action='store_true', help='random weights: read none')
    parser.add_argument('--layers', nargs='+', default=['practical'], help='names, aliases, patterns or set names')
    parser.add_argument('--timesteps', nargs='+', type=parse_timestep, default=[50])
    parser.add_argument('--size', type=int, help="resize to S x S (default: each image's own size)")
    parser.add_argument('--count', type=int, help='images that are used (default: all)')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--workers', type=int, help="processes that decode (default: the tool's)")
    add_dtype_argument(parser)
    parser.add_argument('--save-dtype', choices=DTYPES, default='float16', help='to store')
    parser.add_argument('--repeat', type=int, default=5, help='pairs of measurements (default: %(default)s)')
    parser.add_argument('--device', default=default_device())
    args = parser.parse_args(argv)
    args.size = args.size and (args.size, args.size)
    return args


def run(args: argparse.Namespace, out: str) -> None:
    items = find_images(args.images)[0][: args.count]
    workers = default_workers(len(items), args.device) if args.workers is None else args.workers
    if workers:
        start_fork_server()
    config, network = load_config(args.model), meta_network(args.model)
    options = {}
    if args.random:
        parts = (config.part,) if config.pixel_space else (config.part, 'vae')
        options = {'prompt': placeholder_conditioning(config.network), 'weights': {'random': parts}}
    extractor = DiffusionExtractor(
        args.model,
        expand(args.layers, sites(network)),
        args.timesteps,
        dtype=args.dtype,
        runtime={'device': args.device, 'check_finite': False},
        **options,
    ).to(args.device)
    device = torch.device(args.device)
    headers = {item: header(item, {'timesteps': list(extractor.timesteps)}) for item in items}
    read = list(batches(decode(items, args.size, device), args.batch))
    failures = [images for _, images in read if isinstance(images, str)]
    if failures:
        raise ValueError(f'{len(failures)} of {len(items)} images cannot be used; the first: {failures[0]}')
    decoded = [upload_pixels(images, device) for _, images in read]

    def bare() -> None:
        with torch.inference_mode():
            for images in decoded:
                extractor(images)

    def tool(network: torch.nn.Module = extractor) -> None:
        written = extract_features(
            network,
            headers,
            *locate(tempfile.mkdtemp(dir=out)),
            size=args.size,
            dtype=DTYPES[args.save_dtype],
            batch=args.batch,
            workers=workers,
        )
        failures = [failure for _, failure in written if failure is not None]
        if failures:
            raise ValueError(f'{len(failures)} of {len(items)} files cannot be written; the first: {failures[0]}')

    wall, cpu = {bare: [], tool: []}, {bare: [], tool: []}
    for _ in range(1 + args.repeat):
        for procedure in (bare, tool):
            start = time.process_time()
            wall[procedure].append(timed(procedure, args.device))
            cpu[procedure].append(time.process_time() - start)
    replay = Replay(extractor)
    tool(replay)
    host = statistics.median(timed(lambda: tool(replay), args.device) for _ in range(args.repeat))
    ratios, cpu_ratios = ([a / b for a, b in zip(x[bare], x[tool], strict=True)][1:] for x in (wall, cpu))
    row = [len(items), 'x'.join(map(str, args.size)) if args.size else 'own', args.batch, workers]
    row += [f'{len(items) / statistics.median(seconds[1:]):.3g}' for seconds in wall.values()]
    row.append(f'{host / len(items) * 1000:.3g}')
    row += [f'{statistics.median(values):.2f}' for values in (ratios, cpu_ratios)]
    row.append(', '.join(f'{ratio:.2f}' for ratio in sorted(ratios)))
    model = f'{args.model}{", random weights" * args.random} in {extractor.fingerprint["dtype"]}'
    sys.stdout.write(f'{model}; {machine(args.device)}\n\n')
    sys.stdout.write(f'{table_head(COLUMNS)}\n| {" | ".join(map(str, row))} |\n')


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as out:
            run(args, out)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    raise SystemExit(main())

"""Measure time, peak memory and operations of feature extraction, beside the published procedure.

    python tools/benchmark.py --model demo/tiny-sd --sizes 64 --layers practical dift --ensembles 1 8
    python tools/benchmark.py --model sd15 --random --sizes 512 --layers practical
    python tools/benchmark.py --model adm-imagenet-256 --random --sizes 256 --layers adm-4 --ensembles 8
    python tools/benchmark.py --model sdxl --sizes 1024 --layers practical legacy --count-only
    python tools/benchmark.py --model flux-dev --sizes 1024 --layers vit-block28-mod --count-only
    python tools/benchmark.py --gpu-report work_dirs/gpu

Each case (size, layers, T timesteps, E ensemble members, dtype) runs in a separate process, where both procedures use
the same modules in turn, ours, published, ours, ... The ratio is the median over these pairs.

* **ours**: `DiffusionExtractor`. One VAE encoding; T * E passes of the network, each ended by the last requested
  activation.
* **published**: what the released code of GDF and DIFT does for each timestep: encode every ensemble member, add noise
  and run the network, here always to its end (DIFT's own code ends after a block).

Models of pixel space encode nothing.

Operations are floating-point operations (2 for a multiply-add) of matrix products, convolutions and attention, as
`torch.utils.flop_counter` counts them; text encoders do not run. Those of a case are compared with:

* **full**: encode once, T * E whole passes;
* **least**: encode once, and of T * E passes every operation on which a requested activation depends. Ours also runs
  the operations before the last requested activation on which none depends.

The last column is the share of a pass that runs before it is stopped.

Peak memory is that of the whole process while a procedure runs, weights included: the device's own count on CUDA, the
kernel's high-water mark of the resident set on Linux.

`--gpu-report DIR` measures a GPU instead: SD 1.5 at 512 pixels (E = 1 and 8), DIFT (SD 2.1 at 768, E = 8) and SDXL at
1024, with random weights in the dtype that the GPU is fastest in; one image, and the largest power of two of them that
fits; with sdpa and, where it is installed, xformers; eager, and with compiled transformer blocks. DIR/report.md and
report.json hold time, peak memory, the share of the rate of large matrix products, and the kernels of the slowest case.
They are written after each case, and when called again, it goes on with those that are missing.
"""

import argparse
import functools
import gc
import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffseg import gpu_report
from diffseg.benchmarking import (
    Operations,
    executed,
    in_subprocess,
    machine,
    peak,
    print_table,
    reset_peak,
    table_head,
    timed,
)
from diffseg.devices import DTYPES, choose_dtype, default_device
from diffseg.diffusion.conditioning import Conditioning
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.latents import latent_space, scale_latents
from diffseg.diffusion.layer_sets import expand
from diffseg.diffusion.loading import load_config, meta_network
from diffseg.diffusion.network_call import NetworkCall, network_dtype
from diffseg.diffusion.placeholders import placeholder_conditioning
from diffseg.diffusion.recorder import ActivationRecorder
from diffseg.diffusion.sites import Network, kind_of, sites


@dataclass(frozen=True)
class Case:
    """One line of the table. `layers` is a comma-separated list, `timesteps` and `ensemble` are numbers of passes."""

    model: str
    size: int
    layers: str
    timesteps: int
    ensemble: int
    dtype: str
    batch: int = 1
    random: bool = False
    device: str = 'cpu'
    repeat: int = 3

    @property
    def steps(self) -> list[int]:
        """Evenly spread timesteps; the cost does not depend on their values."""
        return [50 + 900 * i // self.timesteps for i in range(self.timesteps)]


def encode(vae_config: Mapping[str, Any], side: int) -> None:
    """Encode an image on the meta device."""
    space = latent_space(vae_config)
    with torch.device('meta'):
        space.encode(space.vae.from_config(vae_config), torch.empty(1, 3, side, side))


def condition_of(network: Network, prompt: Conditioning, batch: int, side: int, device: str) -> Mapping[str, Any]:
    """The condition of `NetworkCall`, for images of this side."""
    if kind_of(network).part == 'transformer':
        return prompt.rows([0] * batch, device, network_dtype(network))
    return prompt.unet_kwargs([0] * batch, (side, side), device, network_dtype(network))


@functools.cache
def count_parts(model: str, size: int, layers: str) -> dict[str, int]:
    """FLOP of one image, on the meta device: no weights, no time.

    Returns:
        One VAE encoding (`encode`), and one pass of the network: a whole one (`pass`), one that ends with the last of
        the layers (`stopped`), and the operations that the layers depend on (`needed`).
    """
    configs, network = load_config(model), meta_network(model)
    factor = configs.vae_scale_factor
    available = sites(network, factor)
    step = max(site.stride for site in available.values())
    side = -(-size // step) * step  # the extractor continues images to a multiple of the network's stride
    channels = configs.latent_channels
    latent = torch.empty(1, channels, side // factor, side // factor, device='meta')
    condition = condition_of(network, placeholder_conditioning(configs.network), 1, side, 'meta')
    call, names = NetworkCall(network), expand(layers.split(','), available)
    timestep = torch.full((1,), 50, device='meta')
    with torch.no_grad():
        with Operations() as encoding:
            if not configs.pixel_space:
                encode(configs.vae, side)
        with Operations() as whole:
            activations = call(ActivationRecorder(network, names, stop_early=False), latent, timestep, condition)
        with Operations() as stopped:
            call(ActivationRecorder(network, names), latent, timestep, condition)
    return {
        'encode': encoding.total(),
        'pass': whole.total(),
        'stopped': stopped.total(),
        'needed': whole.needed(activations.values()),
    }


def count(case: Case) -> dict[str, int]:
    """FLOP of one image: the parts, and the totals `ours`, `published`, `full` and `least` as defined above."""
    parts = count_parts(case.model, case.size, case.layers)
    passes = case.timesteps * case.ensemble
    return {
        **parts,
        'ours': parts['encode'] + passes * parts['stopped'],
        'published': passes * (parts['encode'] + parts['pass']),
        'full': parts['encode'] + passes * parts['pass'],
        'least': parts['encode'] + passes * parts['needed'],
    }


def published(extractor: DiffusionExtractor, images: Tensor, prompt: Conditioning) -> dict[str, Tensor]:
    """Extract as the published code does, with the extractor's own modules.

    Returns:
        {layer: (B, T, C, h, w)}, as the extractor does.
    """
    parts, network, vae = extractor.parts, extractor.network, extractor.vae
    recorder, call = ActivationRecorder(network, extractor.layers, stop_early=False), NetworkCall(network)
    repeated = images.repeat_interleave(extractor.ensemble, 0)  # (B*E, 3, H, W)
    batch = len(repeated)
    condition = condition_of(network, prompt, batch, images.shape[-1], images.device)
    steps = []
    for timestep in extractor.timesteps:
        latent = repeated
        if vae is not None:
            mean, std = latent_space(vae).encode(vae, repeated.to(vae.dtype))  # (B*E, C, h, w)
            latent = scale_latents(vae, mean.float() if std is None else mean + std * torch.randn_like(mean))
        noise = torch.randn_like(latent)
        x_t = parts.schedule.add_noise(latent[:, None], noise[:, None], [timestep])[:, 0]
        index = torch.full((batch,), parts.schedule.network_timestep(timestep), device=images.device)
        steps.append(call(recorder, x_t.to(call.dtype), index, condition))
    shape = len(images), extractor.ensemble
    return {name: torch.stack([s[name].unflatten(0, shape).mean(1) for s in steps], 1) for name in extractor.layers}


def measure(case: Case) -> dict[str, Any]:
    """Run both procedures in turn.

    Returns:
        For each procedure its `ms` (median, per image), `peak` bytes (None where it cannot be read) and `flop` (counted
        in the warm-up, per image), and the `ratio` of their times.
    """
    configs = load_config(case.model)
    prompt = placeholder_conditioning(configs.network)
    parts = (configs.part,) if configs.pixel_space else (configs.part, 'vae')
    extractor = DiffusionExtractor(
        case.model,
        expand(case.layers.split(','), sites(meta_network(case.model))),
        case.steps,
        prompt=prompt,
        ensemble=case.ensemble,
        dtype=case.dtype,
        weights={'random': parts if case.random else ()},
        runtime={'device': case.device},
    ).to(case.device)
    images = torch.rand(case.batch, 3, case.size, case.size, device=case.device) * 2 - 1
    procedures = {'ours': lambda: extractor(images), 'published': lambda: published(extractor, images, prompt)}
    result: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in procedures}
    with torch.inference_mode():
        for name, run in procedures.items():
            gc.collect()
            reset_peak(case.device)
            result[name] = {'flop': executed(run) // case.batch, 'peak': peak(case.device)}
        for _ in range(case.repeat):
            for name, run in procedures.items():
                seconds[name].append(timed(run, case.device))
    for name, values in seconds.items():
        result[name]['ms'] = 1000 * statistics.median(values) / case.batch
    result['ratio'] = statistics.median(b / a for a, b in zip(seconds['ours'], seconds['published'], strict=True))
    return result


def titles(measured: bool) -> str:
    """Header of the Markdown table."""
    names = ['size', 'layers', 'T', 'E', 'dtype']
    if measured:
        names += ['ms/image', 'published ms', 'ratio', 'peak GB', 'published GB']
    names += ['TFLOP', 'of published', 'of full', 'over least', 'pass']
    return table_head(names)


def line(row: Mapping[str, Any]) -> str:
    """A case's line of the Markdown table."""
    case, flop = row['case'], row['flop']
    cells = [case['size'], case['layers'], case['timesteps'], case['ensemble'], case['dtype']]
    if 'measured' in row:
        procedures = row['measured']['ours'], row['measured']['published']
        cells += [f'{procedure["ms"]:.0f}' for procedure in procedures] + [f'{row["measured"]["ratio"]:.2f}']
        cells += ['-' if (peak := procedure['peak']) is None else f'{peak / 1e9:.2f}' for procedure in procedures]
    cells += [f'{flop["ours"] / 1e12:.3g}', f'{flop["ours"] / flop["published"]:.0%}']
    cells += [f'{flop["ours"] / flop["full"]:.0%}', f'{flop["ours"] / flop["least"] - 1:+.2%}']
    cells.append(f'{flop["stopped"] / flop["pass"]:.0%}')
    return f'| {" | ".join(map(str, cells))} |'


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--case', help=argparse.SUPPRESS)
    parser.add_argument('--gpu-case', help=argparse.SUPPRESS)
    parser.add_argument('--model', default='demo/tiny-sd', help='preset, hub id or diffusers folder')
    parser.add_argument('--random', action='store_true', help='random weights: read none')
    parser.add_argument('--sizes', nargs='+', type=int, default=[64], help='image sides, pixels')
    parser.add_argument('--layers', nargs='+', default=['practical'], help='sets, each a name or names with commas')
    parser.add_argument('--timesteps', nargs='+', type=int, default=[1], help='numbers of timesteps')
    parser.add_argument('--ensembles', nargs='+', type=int, default=[1], help='numbers of ensemble members')
    parser.add_argument('--dtypes', nargs='+', default=['auto'], choices=('auto', *DTYPES))
    parser.add_argument('--batch', type=int, default=1, help='images in one forward pass')
    parser.add_argument('--repeat', type=int, default=3, help='pairs of measurements')
    parser.add_argument('--device', default=default_device())
    parser.add_argument('--count-only', action='store_true', help='count operations and measure nothing')
    parser.add_argument('--gpu-report', type=Path, metavar='DIR', help='measure a GPU and write a report there')
    parser.add_argument('--json', type=Path, help='write the results there as well')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.case:
        print(json.dumps(measure(Case(**json.loads(args.case)))))
        return 0
    if args.gpu_case:
        print(json.dumps(gpu_report.measure(gpu_report.Case.from_json(args.gpu_case))))
        return 0
    if args.gpu_report:
        return report_gpu(args)
    how = f'counted; torch {torch.__version__}' if args.count_only else machine(args.device)
    title = f'{args.model}{", random weights" * args.random}; {how}'
    return print_table(title, titles(not args.count_only), rows(args), args.json)


def report_gpu(args: argparse.Namespace) -> int:
    """Measure a GPU; the exit status."""
    if torch.device(args.device).type != 'cuda' or not torch.cuda.is_available():
        sys.stderr.write(
            f'error: --gpu-report needs a GPU: --device is {args.device!r}, and torch.cuda.is_available() is '
            f'{torch.cuda.is_available()}\n'
        )
        return 2
    run = functools.partial(in_subprocess, __file__, option='--gpu-case')
    try:
        report = gpu_report.Report(args.gpu_report, args.device, run, repeat=args.repeat)
        report.complete()
    except (OSError, ValueError) as error:
        sys.stderr.write(f'error: {error}\n')
        return 2
    sys.stdout.write(report.markdown())
    return 0


def rows(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each case's results and its line of the table."""
    choices = itertools.product(args.sizes, args.layers, args.timesteps, args.ensembles, args.dtypes)
    parameters = sum(parameter.numel() for parameter in meta_network(args.model).parameters())
    for size, layers, timesteps, ensemble, dtype in choices:
        dtype = str(choose_dtype(dtype, args.device, parameters)).removeprefix('torch.')
        case = Case(
            args.model, size, layers, timesteps, ensemble, dtype, args.batch, args.random, args.device, args.repeat
        )
        row = {'case': asdict(case), 'flop': count(case)}
        if not args.count_only:
            row['measured'] = in_subprocess(__file__, case)
            row['flop'] |= {name: row['measured'][name]['flop'] for name in ('ours', 'published')}
        yield row, line(row)


if __name__ == '__main__':
    raise SystemExit(main())

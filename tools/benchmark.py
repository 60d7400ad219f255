"""Measure time, peak memory and operations of feature extraction, of matching, or of label propagation.

Each beside the published procedure.

    python tools/benchmark.py --model demo/tiny-sd --sizes 64 --layers practical dift --ensembles 1 8
    python tools/benchmark.py --model sd15 --random --sizes 512 --layers practical
    python tools/benchmark.py --model adm-imagenet-256 --random --sizes 256 --layers adm-4 --ensembles 8
    python tools/benchmark.py --model sdxl --sizes 1024 --layers practical legacy --count-only
    python tools/benchmark.py --matching 24 48
    python tools/benchmark.py --propagation --repeat 1

Each case (size, layers, T timesteps, E ensemble members, dtype) runs in a process of its own, where both procedures use
the same modules in turn, ours, published, ours, ... The ratio is the median over these pairs.

* **ours**: `DiffusionExtractor`. One VAE encoding; T * E UNet passes, each ended by the last wanted activation.
* **published**: what the released code of GDF and DIFT does for each timestep: encode every ensemble member, add noise
  and run the UNet, here always to its end (DIFT's own code ends after a block).

Models of pixel space encode nothing.

Operations are floating-point operations (2 for a multiply-add) of matrix products, convolutions and attention, as
`torch.utils.flop_counter` counts them; text encoders do not run. Those of a case are compared with:

* **full**: encode once, T * E whole UNet passes;
* **least**: encode once, and of T * E UNet passes every operation on whose result a wanted activation depends. What is
  executed before the last wanted activation but leads to none of them is the difference from ours.

The last column says how much of a UNet pass runs before it is ended.

Peak memory is that of the whole process while a procedure runs, weights included: the device's own count on CUDA, the
kernel's high-water mark of the resident set on Linux.

With `--matching CELLS ...` it is keypoints that are matched, between random maps of CELLS x CELLS cells, at the size of
the image:

* **ours**: `match_points`;
* **published**: what DIFT's evaluation does: upsample both maps to the size of their image, and for every keypoint
  normalise the whole target map and multiply it with the keypoint's descriptor.

Memory then is what a procedure takes on top of the maps. The last column says how many matches are the same; on random
maps the outermost pixels, which are all alike, may be told apart by rounding errors.

With `--propagation [H W FRAMES]` the labels of FRAMES frames and the first one, of H x W cells, are propagated to one
more; by default 28 frames of 60 x 107 cells, which are DAVIS's 480 x 854 pixels, with DIFT's settings for it:

* **ours**: `propagate_labels`;
* **published**: what DIFT's evaluation does: multiply all cells of all frames with those of the target, zero what is
  outside of windows, and find each column's highest values. Here in place and with one mask for all frames, so that it
  takes less memory than the released code.

Memory is what a procedure takes on top of the maps. The last columns are the largest difference of soft labels, and the
share of cells with the same highest label. Where the similarities of two cells differ by a rounding error, either may
be the last one that counts, which shows as a difference of some hundredths.
"""

import argparse
import functools
import gc
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from diffseg.diffusion.conditioning import Conditioning
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.layer_sets import expand
from diffseg.diffusion.loading import load_config, meta_unet
from diffseg.diffusion.recorder import ActivationRecorder
from diffseg.diffusion.sites import Network, sites
from diffseg.models.correspondence import match_points
from diffseg.models.propagation import propagate_labels

TOKENS = 77


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
        """Evenly spread UNet timesteps; which ones makes no difference to the cost."""
        return [50 + 900 * i // self.timesteps for i in range(self.timesteps)]


@dataclass(frozen=True)
class MatchingCase:
    """One line of the table of matching: maps (channels, cells, cells) and images of height x width pixels."""

    cells: int
    channels: int
    height: int
    width: int
    keypoints: int
    device: str = 'cpu'
    repeat: int = 3


@dataclass(frozen=True)
class PropagationCase:
    """One line of the table of label propagation: height x width cells, `frames` besides the first one."""

    height: int
    width: int
    frames: int
    channels: int
    device: str = 'cpu'
    repeat: int = 3
    labels: int = 4
    topk: int = 15
    radius: int = 15
    temperature: float = 0.2


class Operations(TorchDispatchMode):
    """Record every operation, with its cost, and what it reads and writes, so that unneeded ones can be told apart.

    Meant for the meta device: all tensors are kept, because a storage's identity stands for its content.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[int, set[int], set[int]]] = []  # (FLOP, storages read, storages written)
        self._kept: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        read, written = (self._storages(each) for each in ((args, kwargs), out))
        self.log.append((count(*args, **kwargs, out_val=out) if count else 0, read, written))
        return out

    def _storages(self, value: Any) -> set[int]:
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        self._kept += tensors
        return {tensor.untyped_storage()._cdata for tensor in tensors}

    def total(self) -> int:
        return sum(flop for flop, _, _ in self.log)

    def needed(self, wanted: Iterable[Tensor]) -> int:
        """FLOP of the operations on which any of the `wanted` tensors depends."""
        storages = self._storages(list(wanted))
        total = 0
        for flop, read, written in reversed(self.log):
            if written & storages:
                total += flop
                storages |= read
        return total


def cpu_sdpa_flop(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Cost of the CPU's fused attention from its shapes; PyTorch's counter knows only the GPU's."""
    return sdpa_flop_count(query, key, value)


FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_sdpa_flop}


def executed(run: Callable[[], Any]) -> int:
    """FLOP that a call executes, on whatever device it runs."""
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        run()
    return counter.get_total_flops()


def conditioning(unet: Network, tokens: int = TOKENS) -> Conditioning:
    """An embedding of the right shape, since no text encoder is needed for a measurement; without tokens for pixels."""
    config = unet.config
    if 'cross_attention_dim' not in config:
        return Conditioning(torch.empty(1, 0, 0))
    pooled = None
    if config.addition_embed_type == 'text_time':
        pooled = torch.zeros(1, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
    return Conditioning(torch.zeros(1, tokens, config.cross_attention_dim), pooled)


def encode(vae_config: Mapping[str, Any], side: int) -> None:
    """Encode an image on the meta device."""
    with torch.device('meta'):
        AutoencoderKL.from_config(vae_config).encode(torch.empty(1, 3, side, side))


@functools.cache
def count_parts(model: str, size: int, layers: str) -> dict[str, int]:
    """FLOP of one image, on the meta device: no weights, no time.

    Returns:
        One VAE encoding (`encode`), and one UNet pass: a whole one (`unet`), one that ends with the last of the layers
        (`stopped`), and what of it the layers depend on (`needed`).
    """
    configs, unet = load_config(model), meta_unet(model)
    factor = 1 if configs.pixel_space else 2 ** (len(configs.vae['block_out_channels']) - 1)
    step = factor * 2 ** sum(block.downsamplers is not None for block in unet.down_blocks)
    side = -(-size // step) * step  # the extractor pads to a multiple of the UNet's stride
    latent = torch.empty(1, unet.config.in_channels, side // factor, side // factor, device='meta')
    condition = conditioning(unet).unet_kwargs([0], (side, side), device='meta', dtype=torch.float32)
    names = expand(layers.split(','), sites(unet))
    timestep = torch.tensor(50, device='meta')
    with torch.no_grad():
        with Operations() as encoding:
            if not configs.pixel_space:
                encode(configs.vae, side)
        with Operations() as whole:
            wanted = ActivationRecorder(unet, names, stop_early=False)(latent, timestep, **condition)
        with Operations() as stopped:
            ActivationRecorder(unet, names)(latent, timestep, **condition)
    return {
        'encode': encoding.total(),
        'unet': whole.total(),
        'stopped': stopped.total(),
        'needed': whole.needed(wanted.values()),
    }


def count(case: Case) -> dict[str, int]:
    """FLOP of one image: the parts, and of them `ours`, `published`, `full` and `least` as defined above."""
    parts = count_parts(case.model, case.size, case.layers)
    passes = case.timesteps * case.ensemble
    return {
        **parts,
        'ours': parts['encode'] + passes * parts['stopped'],
        'published': passes * (parts['encode'] + parts['unet']),
        'full': parts['encode'] + passes * parts['unet'],
        'least': parts['encode'] + passes * parts['needed'],
    }


def published(extractor: DiffusionExtractor, images: Tensor, condition: Conditioning) -> dict[str, Tensor]:
    """Extract as the published code does, with the extractor's own modules.

    Returns:
        {layer: (B, T, C, h, w)}, as the extractor does.
    """
    parts, unet, vae = extractor.parts, extractor.unet, extractor.vae
    recorder = ActivationRecorder(unet, extractor.layers, stop_early=False)
    repeated = images.repeat_interleave(extractor.ensemble, 0)  # (B*E, 3, H, W)
    kwargs = condition.unet_kwargs([0] * len(repeated), images.shape[2:], device=images.device, dtype=unet.dtype)
    steps = []
    for timestep in extractor.timesteps:
        latent = repeated
        if vae is not None:
            latent = vae.encode(repeated.to(vae.dtype)).latent_dist.sample() * parts.scaling_factor  # (B*E, 4, h, w)
        alpha = float(parts.alphas_cumprod[timestep])
        x_t = alpha**0.5 * latent + (1 - alpha) ** 0.5 * torch.randn_like(latent)
        steps.append(recorder(x_t.to(unet.dtype), torch.tensor(timestep, device=images.device), **kwargs))
    shape = len(images), extractor.ensemble
    return {name: torch.stack([s[name].unflatten(0, shape).mean(1) for s in steps], 1) for name in extractor.layers}


def measure(case: Case) -> dict[str, Any]:
    """Run both procedures in turn.

    Returns:
        For each procedure its `ms` (median, per image), `peak` bytes (None where it cannot be read) and `flop` (counted
        in the warm-up, per image), and the `ratio` of their times.
    """
    meta = meta_unet(case.model)
    condition = conditioning(meta)
    parts = ('unet',) if load_config(case.model).pixel_space else ('unet', 'vae')
    extractor = DiffusionExtractor(
        case.model,
        expand(case.layers.split(','), sites(meta)),
        case.steps,
        prompt=condition,
        ensemble=case.ensemble,
        dtype=case.dtype,
        random=parts if case.random else (),
    ).to(case.device)
    images = torch.rand(case.batch, 3, case.size, case.size, device=case.device) * 2 - 1
    procedures = {'ours': lambda: extractor(images), 'published': lambda: published(extractor, images, condition)}
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


def published_matches(source: Tensor, target: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
    """Match as DIFT's evaluation on SPair-71k does.

    Args:
        source: descriptors with shape (C, h, w).
        target: the same.
        points: (x, y) with shape (N, 2).
        size: height and width of both images.

    Returns:
        (x, y) with shape (N, 2).
    """
    source, target = (F.interpolate(each[None], size, mode='bilinear') for each in (source, target))
    matches = []
    for x, y in points.tolist():
        query = F.normalize(source[0, :, y, x][None])  # (1, C)
        candidates = F.normalize(target[0].flatten(1).T)  # (H*W, C)
        best = int((candidates @ query.T).cpu().argmax())
        matches.append([best % size[1], best // size[1]])
    return torch.tensor(matches)


def measure_matching(case: MatchingCase) -> dict[str, Any]:
    """Run both procedures in turn.

    Returns:
        For each procedure its `ms` (median), the `memory` in bytes that it took at most on top of what there was (None
        where it cannot be read), the `ratio` of their times, and how many of the matches are the `same`.
    """
    source, target = torch.randn(2, case.channels, case.cells, case.cells, device=case.device)
    size = case.height, case.width
    points = torch.stack([torch.randint(side, (case.keypoints,)) for side in (case.width, case.height)], dim=1)
    procedures = {
        'ours': lambda: match_points(source, target, points, size, size).cpu(),
        'published': lambda: published_matches(source, target, points, size),
    }
    small = source[:2], target[:2], points[:1] * 0
    match_points(*small, (8, 8), (8, 8)), published_matches(*small, (8, 8))  # loads what is loaded with the first call
    result, matches = in_turn(procedures, case.device, case.repeat)
    result['same'] = int((matches['ours'] == matches['published']).all(1).sum())
    return result


def masked_matrix(
    target: Tensor, context: Tensor, labels: Tensor, topk: int, radius: int, temperature: float
) -> Tensor:
    """Propagate labels as DIFT's evaluation on DAVIS does.

    Args:
        target: descriptors with shape (C, h, w).
        context: the same of n frames, shape (n, C, h, w).
        labels: theirs, with shape (n, K, h, w).
        topk: how many cells to average.
        radius: of the window, in cells.
        temperature: of the weights.

    Returns:
        Shape (K, h, w).
    """
    cells = target.shape[1:]
    queries, keys = F.normalize(target.flatten(1), dim=0), F.normalize(context.flatten(2), dim=1)
    weights = torch.bmm(keys.transpose(1, 2), queries.expand(len(keys), -1, -1))  # (n, h*w, h*w)
    weights.div_(temperature).exp_()
    row, column = (
        (each[:, None] - each).abs() <= radius  # (h*w, h*w)
        for each in torch.cartesian_prod(*(torch.arange(side, device=target.device) for side in cells)).T
    )
    weights *= row & column
    weights = weights.flatten(0, 1)  # (n*h*w, h*w)
    weights[weights < weights.topk(topk, dim=0).values[-1]] = 0
    weights /= weights.sum(0)
    return (labels.transpose(0, 1).flatten(1) @ weights).unflatten(1, cells)


def measure_propagation(case: PropagationCase) -> dict[str, Any]:
    """Run both procedures in turn.

    Returns:
        As `measure_matching` does; the largest `difference` of soft labels, and the `same` highest labels, a fraction.
    """
    cells = case.height, case.width
    target = torch.randn(case.channels, *cells, device=case.device)
    context = target + torch.randn(case.frames + 1, *target.shape, device=case.device)
    labels = torch.randn(case.frames + 1, case.labels, *cells, device=case.device).softmax(1)
    settings = case.topk, case.radius, case.temperature
    kept = list(context.to(memory_format=torch.channels_last))  # as the model keeps them
    procedures = {
        'ours': lambda: propagate_labels(target, kept, labels, *settings).cpu(),
        'published': lambda: masked_matrix(target, context, labels, *settings).cpu(),
    }
    few = context[:2, :2, :4, :4]
    propagate_labels(few[0], few, few, 2, 1, 1.0), masked_matrix(few[0], few, few, 2, 1, 1.0)  # loads what is loaded
    result, found = in_turn(procedures, case.device, case.repeat)
    result['difference'] = float((found['ours'] - found['published']).abs().max())
    result['same'] = float((found['ours'].argmax(0) == found['published'].argmax(0)).float().mean())
    return result


def in_turn(
    procedures: Mapping[str, Callable[[], Any]], device: str, repeat: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run `ours` and `published` once for their memory, then in turn for their times.

    Returns:
        Their `ms`, `memory` and `ratio`, see `measure_matching`; and what each of them returned.
    """
    result: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in procedures}
    returned = {}
    with torch.inference_mode():
        for name, run in procedures.items():
            gc.collect()
            reset_peak(device)
            before = peak(device)
            returned[name] = run()
            result[name] = {'memory': None if before is None else peak(device) - before}
        for _ in range(repeat):
            for name, run in procedures.items():
                seconds[name].append(timed(run, device))
    for name, values in seconds.items():
        result[name]['ms'] = 1000 * statistics.median(values)
    result['ratio'] = statistics.median(b / a for a, b in zip(seconds['ours'], seconds['published'], strict=True))
    return result, returned


MEASURES = {
    'Case': (Case, measure),
    'MatchingCase': (MatchingCase, measure_matching),
    'PropagationCase': (PropagationCase, measure_propagation),
}


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds that a call takes until its results are there."""
    start = time.perf_counter()
    run()
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def reset_peak(device: str) -> None:
    if device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == 'linux':
        Path('/proc/self/clear_refs').write_text('5')  # proc_pid_clear_refs(5): resets the high-water mark


def peak(device: str) -> int | None:
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == 'linux':
        fields = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
        return int(fields['VmHWM'].split()[0]) * 1024
    return None


def in_subprocess(case: Case | MatchingCase | PropagationCase) -> dict[str, Any]:
    """Measure a case in a fresh process, so that no case sees the memory of another."""
    command = [sys.executable, __file__, '--case', type(case).__name__, json.dumps(asdict(case))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f'{case} ended with status {done.returncode}')
    return json.loads(done.stdout.splitlines()[-1])


def titles(measured: bool) -> str:
    """Head of the Markdown table."""
    names = ['size', 'layers', 'T', 'E', 'dtype']
    if measured:
        names += ['ms/image', 'published ms', 'ratio', 'peak GB', 'published GB']
    names += ['TFLOP', 'of published', 'of full', 'over least', 'UNet pass']
    return table_head(names)


def table_head(names: Sequence[str]) -> str:
    return f'| {" | ".join(names)} |\n|{"---|" * len(names)}'


def line(row: Mapping[str, Any]) -> str:
    """A case's line of the Markdown table."""
    case, flop = row['case'], row['flop']
    cells = [case['size'], case['layers'], case['timesteps'], case['ensemble'], case['dtype']]
    if 'measured' in row:
        ours, theirs = row['measured']['ours'], row['measured']['published']
        cells += [f'{ours["ms"]:.0f}', f'{theirs["ms"]:.0f}', f'{row["measured"]["ratio"]:.2f}']
        cells += ['-' if each['peak'] is None else f'{each["peak"] / 1e9:.2f}' for each in (ours, theirs)]
    cells += [f'{flop["ours"] / 1e12:.3g}', f'{flop["ours"] / flop["published"]:.0%}']
    cells += [f'{flop["ours"] / flop["full"]:.0%}', f'{flop["ours"] / flop["least"] - 1:+.2%}']
    cells.append(f'{flop["stopped"] / flop["unet"]:.0%}')
    return f'| {" | ".join(map(str, cells))} |'


MATCHING_TITLES = 'cells', 'channels', 'image', 'keypoints', 'ms', 'published ms', 'ratio', 'MB', 'published MB', 'same'


def matching_line(case: MatchingCase, found: Mapping[str, Any]) -> str:
    """A case's line of the Markdown table of matching."""
    ours, theirs = found['ours'], found['published']
    cells = [case.cells, case.channels, f'{case.height} x {case.width}', case.keypoints]
    cells += [f'{ours["ms"]:.0f}', f'{theirs["ms"]:.0f}', f'{found["ratio"]:.0f}']
    cells += ['-' if each['memory'] is None else f'{each["memory"] / 1e6:.0f}' for each in (ours, theirs)]
    return f'| {" | ".join(map(str, [*cells, found["same"]]))} |'


PROPAGATION_TITLES = (
    *('cells', 'frames', 'channels', 'ms', 'published ms', 'ratio', 'MB', 'published MB'),
    *('difference', 'same labels'),
)


def propagation_line(case: PropagationCase, found: Mapping[str, Any]) -> str:
    """A case's line of the Markdown table of label propagation."""
    ours, theirs = found['ours'], found['published']
    cells = [f'{case.height} x {case.width}', f'{case.frames} + 1', case.channels]
    cells += [f'{ours["ms"]:.0f}', f'{theirs["ms"]:.0f}', f'{found["ratio"]:.1f}']
    cells += ['-' if each['memory'] is None else f'{each["memory"] / 1e6:.0f}' for each in (ours, theirs)]
    return f'| {" | ".join(map(str, cells))} | {found["difference"]:.0e} | {found["same"]:.2%} |'


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--case', nargs=2, help=argparse.SUPPRESS)
    parser.add_argument('--model', default='demo/tiny-sd', help='preset, hub id or diffusers folder')
    parser.add_argument('--random', action='store_true', help='random weights: read none')
    parser.add_argument('--sizes', nargs='+', type=int, default=[64], help='image sides, pixels')
    parser.add_argument('--layers', nargs='+', default=['practical'], help='sets, each a name or names with commas')
    parser.add_argument('--timesteps', nargs='+', type=int, default=[1], help='numbers of timesteps')
    parser.add_argument('--ensembles', nargs='+', type=int, default=[1], help='numbers of ensemble members')
    parser.add_argument('--dtypes', nargs='+', default=['float32'], choices=('float32', 'float16', 'bfloat16'))
    parser.add_argument('--batch', type=int, default=1, help='images that are run together')
    parser.add_argument('--repeat', type=int, default=3, help='pairs of measurements')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--count-only', action='store_true', help='count operations and measure nothing')
    parser.add_argument(
        '--matching', nargs='+', type=int, metavar='CELLS', help='measure matching, maps of these sides'
    )
    parser.add_argument(
        '--propagation', nargs='*', type=int, metavar='N', help='measure label propagation: H W FRAMES (60 107 28)'
    )
    parser.add_argument('--channels', type=int, help='of the maps (1280 to match, 640 to propagate)')
    parser.add_argument('--keypoints', type=int, default=10, help='that are matched')
    parser.add_argument('--image-size', nargs=2, type=int, default=(375, 500), metavar=('HEIGHT', 'WIDTH'))
    parser.add_argument('--json', type=Path, help='write the results there as well')
    args = parser.parse_args(argv)
    if args.propagation == []:
        args.propagation = [60, 107, 28]
    if args.propagation and len(args.propagation) != 3:
        parser.error(f'--propagation takes H W FRAMES or nothing, not {args.propagation}')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.case:
        kind, run = MEASURES[args.case[0]]
        print(json.dumps(run(kind(**json.loads(args.case[1])))))
        return 0
    on_gpu = args.device.startswith('cuda')
    machine = torch.cuda.get_device_name(args.device) if on_gpu else platform.processor() or platform.machine()
    how = 'counted' if args.count_only else f'{machine}, {torch.get_num_threads()} threads'
    what, head, lines = f'{args.model}{", random weights" * args.random}', titles(not args.count_only), extraction_rows
    if args.matching:
        what, head, lines = 'matching', table_head(MATCHING_TITLES), matching_rows
    elif args.propagation:
        what, head, lines = 'label propagation', table_head(PROPAGATION_TITLES), propagation_rows
    print(f'{what}; {how}; torch {torch.__version__}\n')
    print(head)
    rows = []
    try:
        for row, text in lines(args):
            rows.append(row)
            print(text, flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=2) + '\n')
    except (OSError, RuntimeError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


def extraction_rows(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    """Each case's results, and its line."""
    choices = itertools.product(args.sizes, args.layers, args.timesteps, args.ensembles, args.dtypes)
    for size, layers, timesteps, ensemble, dtype in choices:
        case = Case(
            args.model, size, layers, timesteps, ensemble, dtype, args.batch, args.random, args.device, args.repeat
        )
        row = {'case': asdict(case), 'flop': count(case)}
        if not args.count_only:
            row['measured'] = in_subprocess(case)
            row['flop'] |= {name: row['measured'][name]['flop'] for name in ('ours', 'published')}
        yield row, line(row)


def matching_rows(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    """Each case's results, and its line."""
    for cells in args.matching:
        case = MatchingCase(cells, args.channels or 1280, *args.image_size, args.keypoints, args.device, args.repeat)
        found = in_subprocess(case)
        yield {'case': asdict(case), 'measured': found}, matching_line(case, found)


def propagation_rows(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    """The case's results, and its line."""
    case = PropagationCase(*args.propagation, args.channels or 640, args.device, args.repeat)
    found = in_subprocess(case)
    yield {'case': asdict(case), 'measured': found}, propagation_line(case, found)


if __name__ == '__main__':
    raise SystemExit(main())

"""What extraction takes on a GPU: time, memory, the share of the rate of its matrix products, and by which kernels."""

import gc
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from diffseg import costs
from diffseg.benchmarking import machine, peak, reset_peak, table_head, timed
from diffseg.costs import Setting, build, cost
from diffseg.devices import choose_dtype
from diffseg.files import whole_file

SETTINGS = {
    'SD 1.5, E = 1': costs.SETTINGS['SD1.5, practical layers'],
    'SD 1.5, E = 8': replace(costs.SETTINGS['SD1.5, practical layers'], ensemble=8),
    'DIFT: SD 2.1, E = 8': costs.SETTINGS['DIFT: SD2.1, E = 8'],
    'SDXL': costs.SETTINGS['SDXL, practical layers'],
}
ATTENTION = ('sdpa', 'xformers')
COLUMNS = 'case', 'size', 'attention', 'blocks', 'batch', 'ms/image', 'peak GB', 'TFLOP/image', 'TFLOP/s', 'of matmul'
KERNELS = 25  # lines of the table


@dataclass(frozen=True)
class Case:
    """One setting with one implementation of attention, in a process of its own.

    Attributes:
        name: Of the setting.
        setting: What is read of each image; weights are random.
        attention: 'sdpa' or 'xformers'.
        compiled: Whether the transformer blocks in which nothing is read are compiled, as by diffusers'
            `compile_repeated_blocks`.
        device: Where it runs.
        repeat: Passes that are timed, after one that is not.
        profiled: Measure kernels instead of batches.
    """

    name: str
    setting: Setting
    attention: str
    compiled: bool
    device: str
    repeat: int = 3
    profiled: bool = False

    @classmethod
    def from_json(cls, text: str) -> 'Case':
        """The case that `json.dumps(asdict(case))` describes."""
        fields = json.loads(text)
        lists = {name: tuple(fields['setting'][name]) for name in ('layers', 'timesteps')}
        return cls(**{**fields, 'setting': Setting(**{**fields['setting'], **lists})})

    @property
    def key(self) -> str:
        """What its results are stored under."""
        return f'{self.name}, {self.attention}, {"compiled" if self.compiled else "eager"}'


def cases(device: str, settings: Mapping[str, Setting], attention: Sequence[str], repeat: int) -> list[Case]:
    """Every setting with every implementation of attention, eager and compiled."""
    return [
        Case(name, setting, kind, compiled, device, repeat)
        for name, setting in settings.items()
        for kind in attention
        for compiled in (False, True)
    ]


def matrix_rate(device: str, dtype: torch.dtype, side: int = 8192, repeat: int = 20) -> float:
    """FLOP per second of products of square matrices, from the median of `repeat` of them."""
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    a @ b
    seconds = statistics.median(timed(lambda: a @ b, device) for _ in range(repeat))
    return 2 * side**3 / seconds


def largest_batch(run: Callable[[int], Any], device: str) -> tuple[int, str]:
    """The largest power of two that the device has memory for.

    Args:
        run: Extracts from a number of images.
        device: Whose cache of freed memory is emptied after each try.

    Returns:
        The batch, 0 if not even one image fits, and what ended the search: the first line of the error.
    """
    batch, error = 0, None
    while error is None:
        try:
            run(max(1, 2 * batch))
            batch = max(1, 2 * batch)
        except RuntimeError as raised:  # out of memory; or a kernel that cannot index so many values
            error = f'{type(raised).__name__}: ' + str(raised).partition('\n')[0]
        gc.collect()
        if torch.device(device).type != 'cpu':
            torch.get_device_module(device).empty_cache()
    return batch, error


def measure(case: Case, side: int = 8192) -> dict[str, Any]:
    """Measure one image and the largest batch, or the kernels of one image.

    Args:
        case: What to measure.
        side: Of the matrices of `matrix_rate`.

    Returns:
        Without `profiled`: `dtype`, `rate` (FLOP per second of matrix products), `flop` of an image, `ended` (what
        ended the search of the largest batch), and for each batch in `batches` its `batch`, `ms` per image (median) and
        `peak` bytes, weights included. With it: `kernels`, see `kernel_times`.
    """
    dtype = choose_dtype('auto', case.device)
    extractor = build(
        case.setting, dtype=dtype, memory_format='auto', attention=case.attention, compile=case.compiled
    ).to(case.device)
    size = case.setting.size

    def run(batch: int) -> None:
        extractor(torch.zeros(batch, 3, size, size, device=case.device))

    with torch.inference_mode():
        if case.profiled:
            run(1)
            return {'kernels': kernel_times(lambda: run(1), case.device)}
        rate = matrix_rate(case.device, dtype, side)
        largest, ended = largest_batch(run, case.device)
        batches = []
        for batch in sorted({1, largest} if largest else ()):
            run(batch)
            reset_peak(case.device)
            seconds = statistics.median(timed(lambda batch=batch: run(batch), case.device) for _ in range(case.repeat))
            batches.append({'batch': batch, 'ms': 1000 * seconds / batch, 'peak': peak(case.device)})
    return {
        'dtype': str(dtype).removeprefix('torch.'),
        'rate': rate,
        'flop': cost(case.setting).flop,
        'ended': ended,
        'batches': batches,
    }


def kernel_times(run: Callable[[], Any], device: str) -> list[dict[str, Any]]:
    """Time in the kernels of a device, those of the CPU's operations on a CPU, by the torch profiler.

    Returns:
        `name`, `calls` and `ms` of each, from the longest time to the shortest.
    """
    on_cpu = torch.device(device).type == 'cpu'
    with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as profiler:
        timed(run, device)
    time = 'self_cpu_time_total' if on_cpu else 'self_device_time_total'  # microseconds
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, time))
    return [
        {'name': event.key, 'calls': event.count, 'ms': getattr(event, time) / 1000}
        for event in events
        if getattr(event, time) > 0
    ]


@dataclass
class Report:
    """Results in a folder, `report.json` and `report.md`, which are written after each case.

    A report that was interrupted goes on with the cases that are missing; those that failed are tried again.

    Args:
        folder: Where they are written.
        device: What is measured.
        run: Measures a case in a process of its own.
        settings: What is measured, by name.
        repeat: See `Case`.
    """

    folder: Path
    device: str
    run: Callable[[Case], dict[str, Any]]
    settings: Mapping[str, Setting] = field(default_factory=lambda: SETTINGS)
    repeat: int = 3

    def __post_init__(self) -> None:
        self.attention = ATTENTION if find_spec('xformers') else ATTENTION[:1]
        self.cases = cases(self.device, self.settings, self.attention, self.repeat)
        self.results: dict[str, dict[str, Any]] = {}
        path = self.folder / 'report.json'
        if path.is_file():
            stored = json.loads(path.read_text())
            if stored['machine'] != machine(self.device):
                raise ValueError(
                    f'{path} was measured on {stored["machine"]}, this is {machine(self.device)}; choose another folder'
                )
            self.results = {key: result for key, result in stored['results'].items() if 'error' not in result}

    def complete(self) -> None:
        """Measure what is missing, and the kernels of the slowest case."""
        for case in self.cases:
            self._measure(case.key, case)
        if (slowest := self.slowest()) is not None:
            self._measure('kernels', replace(slowest, profiled=True))

    def _measure(self, key: str, case: Case) -> None:
        if key in self.results:
            return
        sys.stderr.write(f'{key} ...\n')
        try:
            self.results[key] = self.run(case)
        except RuntimeError as error:
            self.results[key] = {'error': str(error)}
        if case.profiled:
            self.results[key]['of'] = case.key
        content = {'machine': machine(self.device), 'cases': [asdict(each) for each in self.cases]}
        with whole_file(self.folder / 'report.json') as partial:
            partial.write_text(json.dumps({**content, 'results': self.results}, indent=2) + '\n')
        with whole_file(self.folder / 'report.md') as partial:
            partial.write_text(self.markdown())

    def slowest(self) -> Case | None:
        """The case that takes most time for one image alone; None if none was measured."""
        measured = [case for case in self.cases if self.results.get(case.key, {}).get('batches')]
        return max(measured, key=lambda case: self.results[case.key]['batches'][0]['ms'], default=None)

    def markdown(self) -> str:
        """The report as Markdown."""
        lines = [f'# {machine(self.device)}', '', table_head(COLUMNS)]
        notes = []
        for case in self.cases:
            result = self.results.get(case.key)
            if result is None:
                continue
            if 'error' in result:
                notes.append(f'* {case.key}: failed. {result["error"]}')
                continue
            lines += [_row(case, result, batch) for batch in result['batches']]
            notes.append(f'* {case.key}: {result["dtype"]}, matrix products at {result["rate"] / 1e12:.0f} TFLOP/s; ')
            notes[-1] += f'the search of the largest batch ended with {result["ended"]}'
        if 'xformers' not in self.attention:
            notes.append('* xformers is not installed, so that sdpa alone was measured.')
        lines += ['', *notes]
        if 'kernels' in self.results:
            lines += ['', *_kernel_lines(self.results['kernels'])]
        return '\n'.join(lines) + '\n'


def _row(case: Case, result: Mapping[str, Any], batch: Mapping[str, Any]) -> str:
    rate = result['flop'] / (batch['ms'] / 1000)
    cells = [
        case.name,
        case.setting.size,
        case.attention,
        'compiled' if case.compiled else 'eager',
        batch['batch'],
        f'{batch["ms"]:.1f}',
        '-' if batch['peak'] is None else f'{batch["peak"] / 1e9:.2f}',
        f'{result["flop"] / 1e12:.3g}',
        f'{rate / 1e12:.1f}',
        f'{rate / result["rate"]:.1%}',
    ]
    return f'| {" | ".join(map(str, cells))} |'


def _kernel_lines(result: Mapping[str, Any]) -> list[str]:
    if 'error' in result:
        return [f'Kernels of {result["of"]}, batch 1: failed. {result["error"]}']
    total = sum(kernel['ms'] for kernel in result['kernels'])
    lines = [f'Kernels of the slowest case, {result["of"]}, batch 1: {total:.2f} ms', '']
    lines.append(table_head(('kernel', 'calls', 'ms', 'share')))
    for kernel in result['kernels'][:KERNELS]:
        name = kernel['name'].replace('|', '\\|')
        lines.append(f'| `{name}` | {kernel["calls"]} | {kernel["ms"]:.3f} | {kernel["ms"] / total:.1%} |')
    return lines

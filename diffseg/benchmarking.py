"""Counting of operations, and measurement of two procedures in turn."""

import gc
import json
import platform
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count


class Operations(TorchDispatchMode):
    """Record the cost, inputs and outputs of every operation, from which unneeded operations follow.

    Meant for the meta device: all tensors are kept alive, because storages are identified by address.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[int, set[int], set[int]]] = []  # (FLOP, storages read, storages written)
        self._kept: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        read, written = (self._storages(tensors) for tensors in ((args, kwargs), out))
        self.log.append((count(*args, **kwargs, out_val=out) if count else 0, read, written))
        return out

    def _storages(self, value: Any) -> set[int]:
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        self._kept += tensors
        return {tensor.untyped_storage()._cdata for tensor in tensors}

    def total(self) -> int:
        """FLOP of all operations."""
        return sum(flop for flop, _, _ in self.log)

    def needed(self, outputs: Iterable[Tensor]) -> int:
        """FLOP of the operations on which any of the `outputs` depends."""
        storages = self._storages(list(outputs))
        total = 0
        for flop, read, written in reversed(self.log):
            if written & storages:
                total += flop
                storages |= read
        return total


def cpu_sdpa_flop(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Cost of the CPU's fused attention from its shapes; PyTorch's counter knows only the GPU's."""
    return sdpa_flop_count(query, key, value)


class LiveMemory(TorchDispatchMode):
    """Count the bytes of tensors that are alive, and the most of them at a time, for tensors with or without values.

    Only those are counted that an operation makes within the mode.

    Attributes:
        live: Bytes now.
        peak: The most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}  # of storages, by address

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, key)
        return out

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_sdpa_flop}


def executed(run: Callable[[], Any]) -> int:
    """FLOP that a call executes, on any device."""
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        run()
    return counter.get_total_flops()


def in_turn(
    procedures: Mapping[str, Callable[[], Any]], device: str, repeat: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the procedures `ours` and `published` once for their memory, then in turn for their times.

    Returns:
        For each procedure its `ms` (median) and its peak `memory` in bytes beyond that before the call (None where it
        cannot be read), and the `ratio` of their times; and the value that each procedure returned.
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


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds that a call takes, including the device's work."""
    start = time.perf_counter()
    run()
    if torch.device(device).type != 'cpu':
        torch.get_device_module(device).synchronize()
    return time.perf_counter() - start


def reset_peak(device: str) -> None:
    """Reset the count of `peak`."""
    if torch.device(device).type != 'cpu':
        torch.get_device_module(device).reset_peak_memory_stats(device)
    elif sys.platform == 'linux':
        Path('/proc/self/clear_refs').write_text('5')  # proc_pid_clear_refs(5): resets the high-water mark


def peak(device: str) -> int | None:
    """Peak memory in bytes, of the device or, for the CPU, of the process; None where it cannot be read."""
    if torch.device(device).type != 'cpu':
        return torch.get_device_module(device).max_memory_allocated(device)
    if sys.platform == 'linux':
        fields = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
        return int(fields['VmHWM'].split()[0]) * 1024
    return None


def in_subprocess(tool: str | Path, case: Any, option: str = '--case') -> dict[str, Any]:
    """Measure a case in a fresh process, so that cases do not share memory.

    Args:
        tool: script that, given `--case JSON`, measures the case and prints the result as the last line, in JSON.
        case: a dataclass.
        option: what stands in place of `--case`.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, str(tool), option, json.dumps(asdict(case))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f'{case} ended with status {done.returncode}')
    return json.loads(done.stdout.splitlines()[-1])


def print_table(title: str, head: str, rows: Iterable[tuple[dict[str, Any], str]], path: Path | None) -> int:
    """Print a Markdown table, each row as soon as it is measured.

    Args:
        title: what is printed above the table.
        head: the table's first two lines, see `table_head`.
        rows: the results and the line of each row.
        path: JSON file to which the results are written, if given.

    Returns:
        The exit status of a tool: 0, or 2 after an error, which is printed to stderr.
    """
    sys.stdout.write(f'{title}\n\n{head}\n')
    results = []
    try:
        for result, text in rows:
            results.append(result)
            sys.stdout.write(f'{text}\n')
            sys.stdout.flush()
            if path is not None:
                path.write_text(json.dumps(results, indent=2) + '\n')
    except (OSError, RuntimeError, ValueError) as error:
        sys.stderr.write(f'error: {error}\n')
        return 2
    return 0


def machine(device: str) -> str:
    """Name of the device, or the processor and PyTorch's number of threads; and PyTorch's version."""
    if torch.device(device).type != 'cpu':
        return f'{torch.get_device_module(device).get_device_name(device)}; torch {torch.__version__}'
    processor = platform.processor() or platform.machine()
    return f'{processor}, {torch.get_num_threads()} threads; torch {torch.__version__}'


def table_head(names: Sequence[str]) -> str:
    """Header of a Markdown table."""
    return f'| {" | ".join(names)} |\n|{"---|" * len(names)}'

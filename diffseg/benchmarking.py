"""Counting operations, and measuring two procedures in turn: what the benchmarks share."""

import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from diffseg.diffusion.conditioning import Conditioning
from diffseg.diffusion.sites import Network

TOKENS = 77  # of a prompt


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
        """FLOP of all operations."""
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


def placeholder_conditioning(unet: Network, tokens: int = TOKENS) -> Conditioning:
    """An embedding of the right shape, since no text encoder is needed for a measurement; without tokens for pixels."""
    config = unet.config
    if 'cross_attention_dim' not in config:
        return Conditioning(torch.empty(1, 0, 0))
    pooled = None
    if config.addition_embed_type == 'text_time':
        pooled = torch.zeros(1, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
    return Conditioning(torch.zeros(1, tokens, config.cross_attention_dim), pooled)


def in_turn(
    procedures: Mapping[str, Callable[[], Any]], device: str, repeat: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the procedures `ours` and `published` once for their memory, then in turn for their times.

    Returns:
        For each procedure its `ms` (median) and the `memory` in bytes that it took at most on top of what there was
        (None where it cannot be read), and the `ratio` of their times; and what each of them returned.
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
    """Seconds that a call takes until its results are there."""
    start = time.perf_counter()
    run()
    if torch.device(device).type != 'cpu':
        torch.get_device_module(device).synchronize()
    return time.perf_counter() - start


def reset_peak(device: str) -> None:
    """Start the count of `peak` anew."""
    if torch.device(device).type != 'cpu':
        torch.get_device_module(device).reset_peak_memory_stats(device)
    elif sys.platform == 'linux':
        Path('/proc/self/clear_refs').write_text('5')  # proc_pid_clear_refs(5): resets the high-water mark


def peak(device: str) -> int | None:
    """The most bytes in use at once, on the device or, for the CPU, in the process; None where it cannot be read."""
    if torch.device(device).type != 'cpu':
        return torch.get_device_module(device).max_memory_allocated(device)
    if sys.platform == 'linux':
        fields = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
        return int(fields['VmHWM'].split()[0]) * 1024
    return None


def in_subprocess(tool: str | Path, case: Any) -> dict[str, Any]:
    """Measure a case in a fresh process, so that no case sees the memory of another.

    Args:
        tool: script that, given `--case JSON`, measures the case and prints the result as the last line, in JSON.
        case: a dataclass.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, str(tool), '--case', json.dumps(asdict(case))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f'{case} ended with status {done.returncode}')
    return json.loads(done.stdout.splitlines()[-1])


def print_rows(rows: Iterable[tuple[dict[str, Any], str]], path: Path | None) -> None:
    """Print the text of each row as soon as it is there; write the results to a JSON file, if there is a path."""
    results = []
    for result, text in rows:
        results.append(result)
        sys.stdout.write(f'{text}\n')
        sys.stdout.flush()
        if path is not None:
            path.write_text(json.dumps(results, indent=2) + '\n')


def machine(device: str) -> str:
    """What a benchmark runs on: the device's name, or the processor and PyTorch's threads; and PyTorch's version."""
    if torch.device(device).type != 'cpu':
        return f'{torch.get_device_module(device).get_device_name(device)}; torch {torch.__version__}'
    processor = platform.processor() or platform.machine()
    return f'{processor}, {torch.get_num_threads()} threads; torch {torch.__version__}'


def table_head(names: Sequence[str]) -> str:
    """Head of a Markdown table."""
    return f'| {" | ".join(names)} |\n|{"---|" * len(names)}'

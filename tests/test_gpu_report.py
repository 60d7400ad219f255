"""The report of a GPU, at sizes that a CPU can measure."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from diffseg import gpu_report
from diffseg.costs import Setting, cost
from diffseg.gpu_report import Case, Report, kernel_times, largest_batch, measure


@pytest.fixture
def setting(tiny_pipeline: Path) -> Setting:
    return Setting(str(tiny_pipeline), 64, ('up-level1-repeat0-res-out',), (50,), 2)


def test_one_image_and_the_most_that_fit_are_measured(setting, monkeypatch):
    compiled, build = [], gpu_report.build

    def build_small(*args, **options):
        """An extractor that has memory for three images."""
        extractor = build(*args, **options)

        def check(module: torch.nn.Module, inputs: tuple) -> None:
            if len(inputs[0]) > 3:
                raise torch.OutOfMemoryError('CUDA out of memory.\nTried to allocate 2 GiB')

        extractor.register_forward_pre_hook(check)
        return extractor

    monkeypatch.setattr(gpu_report, 'build', build_small)
    monkeypatch.setattr(torch, 'compile', lambda call, **_: compiled.append(call) or call)
    case = Case('tiny', setting, 'sdpa', True, 'cpu', repeat=1)
    assert Case.from_json(json.dumps(asdict(case))) == case
    result = measure(case, side=64)
    assert [batch['batch'] for batch in result['batches']] == [1, 2] and compiled
    assert all(batch['ms'] > 0 for batch in result['batches'])
    assert result['ended'] == 'OutOfMemoryError: CUDA out of memory.'
    assert result['flop'] == cost(setting).flop > 0 and result['rate'] > 0


def test_not_even_one_image_may_fit():
    def run(batch: int) -> None:
        raise torch.OutOfMemoryError

    assert largest_batch(run, 'cpu') == (0, 'OutOfMemoryError: ')


def test_kernels_come_by_their_time():
    a = torch.randn(256, 256)
    kernels = kernel_times(lambda: (a @ a, a + a, a + a), 'cpu')
    calls = {kernel['name']: kernel['calls'] for kernel in kernels}
    assert calls['aten::mm'] == 1 and calls['aten::add'] == 2
    times = [kernel['ms'] for kernel in kernels]
    assert times == sorted(times, reverse=True) and times[-1] > 0


def test_a_report_goes_on_and_says_what_failed_and_what_is_slowest(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, 'find_spec', lambda name: None)
    times, calls = {'slow': 8.0, 'fast': 2.0}, []

    def run(case: Case) -> dict:
        calls.append(case.key)
        if case.profiled:
            return {'kernels': [{'name': 'gemm', 'calls': 3, 'ms': 1.5}, {'name': 'a|b', 'calls': 1, 'ms': 0.5}]}
        if case.compiled and len(calls) < 5:
            raise RuntimeError('it broke')
        peaks = {'peak': 5 * 10**9}
        batches = [{'batch': 1, 'ms': times[case.name], **peaks}, {'batch': 4, 'ms': times[case.name] / 2, **peaks}]
        return {'dtype': 'bfloat16', 'rate': 1e15, 'flop': 10**12, 'ended': 'OutOfMemoryError: no', 'batches': batches}

    settings = dict.fromkeys(times, setting)
    Report(tmp_path, 'cpu', run, settings).complete()
    first = (tmp_path / 'report.md').read_text()
    assert '* slow, sdpa, compiled: failed. it broke' in first and 'xformers is not installed' in first
    assert '| slow | 64 | sdpa | eager | 1 | 8.0 | 5.00 | 1 | 125.0 | 12.5% |' in first
    assert '| fast | 64 | sdpa | eager | 4 | 1.0 | 5.00 | 1 | 1000.0 | 100.0% |' in first
    assert 'Kernels of the slowest case, slow, sdpa, eager, batch 1: 2.00 ms' in first
    assert '| `gemm` | 3 | 1.500 | 75.0% |' in first and '| `a\\|b` | 1 | 0.500 | 25.0% |' in first

    assert len(calls) == 5
    Report(tmp_path, 'cpu', run, settings).complete()
    assert calls[5:] == ['slow, sdpa, compiled', 'fast, sdpa, compiled']
    assert 'failed' not in (tmp_path / 'report.md').read_text()
    monkeypatch.setattr(gpu_report, 'machine', lambda device: 'another')
    with pytest.raises(ValueError, match=r'was measured on .*, this is another; choose another folder'):
        Report(tmp_path, 'cpu', run, settings)

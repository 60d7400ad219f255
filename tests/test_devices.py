"""What a device is good at, for devices that are not at hand."""

import contextlib
import logging

import pytest
import torch

from diffseg import devices
from diffseg.devices import SMALL_NETWORK, choose_dtype, choose_memory_format, fast_dtype

CPU, CUDA = torch.device('cpu'), torch.device('cuda')


@pytest.fixture
def cpu_of(monkeypatch: pytest.MonkeyPatch):
    """`cpu_of('amx_bf16')` is a machine without accelerator, whose CPU has this."""

    def have(*names: str) -> None:
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {**dict.fromkeys(names, True), 'avx512_f': True})
        monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)

    return have


@pytest.mark.parametrize(
    ('names', 'dtype'),
    [(['amx_bf16'], torch.bfloat16), (['avx512_bf16', 'avx2'], torch.bfloat16), (['avx2', 'bf16'], torch.float32)],
)
def test_bfloat16_on_cpus_that_multiply_it(cpu_of, names, dtype):
    cpu_of(*names)
    assert fast_dtype(CPU) == choose_dtype('auto') == choose_dtype('auto', 'cpu') == dtype


def test_a_cpu_of_which_nothing_is_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch.cpu, 'get_capabilities')
    assert fast_dtype(CPU) == torch.float32


@pytest.mark.parametrize(('native', 'dtype'), [(True, torch.bfloat16), (False, torch.float16)])
def test_gpus(monkeypatch: pytest.MonkeyPatch, native, dtype):
    monkeypatch.setattr(torch.cuda, 'device', lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: native or including_emulation)
    assert choose_dtype('auto', CUDA) == dtype
    assert choose_memory_format('auto', dtype, CUDA) == torch.channels_last


def test_other_accelerators_compute_in_float32():
    assert choose_dtype('auto', 'mps') == torch.float32
    assert choose_memory_format('auto', torch.float16, 'mps') == torch.contiguous_format


def test_memory_formats(cpu_of):
    cpu_of('amx_bf16')
    assert choose_memory_format('auto', torch.bfloat16) == torch.channels_last
    assert choose_memory_format('channels_last', torch.float64) == torch.channels_last
    assert choose_memory_format('contiguous', torch.bfloat16) == torch.contiguous_format
    with pytest.raises(ValueError, match=r"memory_format is True; it is one of 'auto', 'contiguous', 'channels_last'"):
        choose_memory_format(True, torch.float32)


def test_small_networks_stay_in_float32(cpu_of):
    cpu_of('amx_bf16')
    assert choose_dtype('auto', parameters=SMALL_NETWORK - 1) == torch.float32
    assert choose_dtype('auto', parameters=SMALL_NETWORK) == torch.bfloat16
    assert choose_dtype('bfloat16', parameters=1) == torch.bfloat16


def test_named_dtypes():
    assert choose_dtype('float16', 'cpu') == choose_dtype(torch.float16) == torch.float16
    for wrong in ('half precision', 'Tensor', 16):
        with pytest.raises(ValueError, match=r"unknown dtype .*; use 'auto', 'float32', 'float16', 'bfloat16'"):
            choose_dtype(wrong)


def test_a_choice_is_logged_once(cpu_of, caplog: pytest.LogCaptureFixture):
    cpu_of('amx_bf16')
    devices._chosen.cache_clear()
    with caplog.at_level(logging.INFO, 'diffseg'):
        for _ in range(2):
            choose_memory_format('auto', choose_dtype('auto'))
    assert caplog.messages == [
        'dtype: bfloat16, the faster one on cpu',
        'memory format: channels_last, the faster one on cpu',
    ]

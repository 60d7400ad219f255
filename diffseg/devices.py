"""What a device is good at, and transfer of tensors to it."""

import logging
from functools import cache

import torch
from torch import Tensor

DTYPES = ('float32', 'float16', 'bfloat16')
MEMORY_FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
SMALL_NETWORK = 50_000_000  # parameters, below which 16 bits do not shorten the pass of a small image
NATIVE_BFLOAT16 = ('avx512_bf16', 'amx_bf16')  # instruction sets of CPUs that multiply it, as PyTorch names them

logger = logging.getLogger(__name__)


def default_device() -> str:
    """Name of the available accelerator, or `cpu`."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else 'cpu'


def choose_dtype(
    dtype: str | torch.dtype, device: torch.device | str | None = None, parameters: int | None = None
) -> torch.dtype:
    """A dtype by its name, or for 'auto' the fastest one of a device, see `fast_dtype`.

    Small networks stay in float32: on small images they take the time of starting operations, and conversions add to
    it.

    Args:
        dtype: 'auto', the name of one of PyTorch's, or one of these itself.
        device: The device of the computation; None is the accelerator, or the CPU where there is none.
        parameters: Number of parameters of the network; it is small below `SMALL_NETWORK`.

    Raises:
        ValueError: There is no such dtype.
    """
    if dtype == 'auto':
        if parameters is not None and parameters < SMALL_NETWORK:
            return torch.float32
        device = torch.device(device or default_device())
        return _chosen('dtype', fast_dtype(device), device.type)
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(torch_dtype, torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}; use 'auto', {', '.join(map(repr, DTYPES))}")
    return torch_dtype


def choose_memory_format(
    memory_format: str, dtype: torch.dtype, device: torch.device | str | None = None
) -> torch.memory_format:
    """A memory format of convolutions by its name, or for 'auto' the faster one, see `fast_memory_format`.

    Args:
        memory_format: 'auto', 'contiguous' or 'channels_last'.
        dtype: Of the computation.
        device: As in `choose_dtype`.

    Raises:
        ValueError: There is no such format.
    """
    if memory_format == 'auto':
        device = torch.device(device or default_device())
        return _chosen('memory format', fast_memory_format(device, dtype), device.type)
    if memory_format not in MEMORY_FORMATS:
        allowed = ', '.join(map(repr, ('auto', *MEMORY_FORMATS)))
        raise ValueError(f'memory_format is {memory_format!r}; it is one of {allowed}')
    return MEMORY_FORMATS[memory_format]


def fast_dtype(device: torch.device) -> torch.dtype:
    """The fastest dtype in which a device computes.

    That is bfloat16 where it is native (GPUs since compute capability 8.0, CPUs with AVX512-BF16 or AMX), float16 on
    other CUDA devices, else float32. PyTorch before `torch.cpu.get_capabilities` does not tell what a CPU has: float32.
    """
    if device.type == 'cuda':
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == 'cpu' and hasattr(torch.cpu, 'get_capabilities'):
        capabilities = torch.cpu.get_capabilities()
        if any(capabilities.get(name, False) for name in NATIVE_BFLOAT16):
            return torch.bfloat16
    return torch.float32


def fast_memory_format(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """The faster memory format of convolutions: channels-last in 16 bits on CPUs and CUDA devices."""
    halved = dtype in (torch.float16, torch.bfloat16)
    return torch.channels_last if halved and device.type in ('cpu', 'cuda') else torch.contiguous_format


@cache
def _chosen(what: str, choice: torch.dtype | torch.memory_format, device: str) -> torch.dtype | torch.memory_format:
    """Log a choice, once."""
    logger.info(f'{what}: {str(choice).removeprefix("torch.")}, the faster one on {device}')
    return choice


def upload(x: Tensor, device: torch.device | str | None, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a tensor to a device, and convert it, without synchronising with the device.

    Copies from a device to the host are synchronous, since the host must not read them earlier.
    """
    return x.to(device, dtype, non_blocking=x.device.type == 'cpu')

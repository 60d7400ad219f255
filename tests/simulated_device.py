"""An accelerator for tests on a machine that has none: tensors with values that no code may take for the host's.

Within `simulated_device()`, a tensor on `DEVICE` says that it is there, refuses `.numpy()` and `np.asarray`, and does
not mix with tensors of the host, as on a GPU; indexing with the host's indices and `.cpu()`, `.tolist()` and `.item()`
are allowed. Unlike with `torch._subclasses.FakeTensorMode`, values are there, so results can be compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device('lazy', 0)  # of PyTorch's names the one that a CPU build can name, and index
MIXING = {  # operations that take tensors of several devices
    torch.ops.aten.copy_,
    torch.ops.aten.index,
    torch.ops.aten.index_put_,
    torch.ops.aten._index_put_impl_,
}


uploads: list[tuple[int, ...]] = []  # shapes of the tensors that were copied from the host, but for scalars


class SimulatedTensor(Tensor):
    """A tensor on `DEVICE`, whose values `host` holds."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> 'SimulatedTensor':
        layout = {'strides': host.stride(), 'storage_offset': host.storage_offset(), 'dtype': host.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, host.size(), device=DEVICE, **layout)
        tensor.host = host
        return tensor

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def norm(self, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """PyTorch's takes another way on devices that it does not know."""
        return torch.linalg.vector_norm(self, 2 if p == 'fro' else p, dim, keepdim, dtype=dtype)

    def __repr__(self, **_: Any) -> str:
        return f'SimulatedTensor({self.host})'

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Compute with the values, on the device that PyTorch would."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    simulated = [x for x in tensors if isinstance(x, SimulatedTensor)]
    strays = [x for x in tensors if x.dim() and not isinstance(x, SimulatedTensor)]
    wanted = kwargs.get('device')
    if wanted is None:  # of an indexed tensor counts the device, not of the indices
        first = tensors[:1] if func.overloadpacket in MIXING else simulated
        on_device = any(isinstance(x, SimulatedTensor) for x in first)
    else:
        on_device = torch.device(wanted).type == DEVICE.type
        kwargs = {**kwargs, 'device': torch.device('cpu')}
    if on_device and not simulated:
        uploads.extend(tuple(x.shape) for x in strays)
    if simulated and strays and func.overloadpacket not in MIXING:
        raise RuntimeError(f'{func}: expected all tensors to be on one device, found {DEVICE} and cpu')
    host_args, host_kwargs = tree_map_only(SimulatedTensor, lambda x: x.host, (args, kwargs))
    out = func(*host_args, **host_kwargs)
    if not on_device:
        return out
    out = tree_map_only(Tensor, SimulatedTensor, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if simulated else out


def _autocast(device_type: str, *args: Any, autocast: type = torch.autocast, **kwargs: Any) -> torch.autocast:
    """PyTorch's, which does not know `DEVICE`."""
    return autocast('cpu', *args, **kwargs)


@contextmanager
def simulated_device() -> Iterator[torch.device]:
    """Within, `DEVICE` can be used like a GPU."""
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=DEVICE)` reaches the mode as a copy
    try:
        with patch('torch.autocast', _autocast), patch('torch.is_autocast_enabled', lambda *_: False), _Mode():
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(False)

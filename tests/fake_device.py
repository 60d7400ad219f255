"""An accelerator that is not there: it refuses what a real one would refuse, and every wait for it.

Tensors of `FakeTensorMode` have shapes, types and a device, but no values. Operations on them raise, as with a GPU,
where tensors of the host (the CPU) and of the device meet. What needs a value on the host raises as well: on a GPU it
works, but the host waits until the device has finished.

    with fake_device(model) as to_device:
        model(to_device(images))

What a CPU build of PyTorch cannot do with such tensors: record gradients, so that they are off; and `.to('cuda')`,
which asks for the current device, where `.to(torch.device('cuda', 0))` does not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device('cuda', 0)
SHAPED_BY_VALUES = {
    getattr(place, name) for place in (torch, Tensor) for name in ('nonzero', 'masked_select', 'unique', 'bincount')
}


class HostWaitsError(RuntimeError):
    """The host waits for the device."""


@contextmanager
def fake_device(*modules: nn.Module, waits: bool = False) -> Iterator[Callable[[Any], Any]]:
    """Have the parameters and buffers of modules on the fake device, without gradients.

    Args:
        modules: They are as before at the end.
        waits: Allow blocking copies to and from the device. Values that decide what is executed cannot be read all the
            same, because there are none.

    Yields:
        What puts tensors, alone or nested in lists and dicts, on the device.

    Raises:
        HostWaitsError: A copy between host and device that the host waits for (one from the host is made with
            `non_blocking=True`; one to the host always is such a copy), or a result whose shape depends on values, as
            of `x[mask]` and `.nonzero()`.
        DataDependentOutputException: A value is read, as in `.item()`, `.tolist()`, `if tensor:`.
        FakeTensorDeviceMismatchError: Tensors of host and device meet.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def to_device(value: Any) -> Any:
        return tree_map_only(Tensor, lambda x: _fake(x, mode), value)

    places = [
        (tensors, name, tensor)
        for module in {child: None for root in modules for child in root.modules()}
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    fakes: dict[int, Tensor] = {}  # tensors that modules share are one here too
    for tensors, name, tensor in places:
        if id(tensor) not in fakes:
            fake = _fake(tensor, mode)
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
        tensors[name] = fakes[id(tensor)]
    try:
        with mode, _Transfers(waits), _Bindings(), torch.no_grad():
            yield to_device
    finally:
        for tensors, name, tensor in places:
            tensors[name] = tensor


def _fake(x: Tensor, mode: FakeTensorMode) -> Tensor:
    if isinstance(x, FakeTensor) and x.device == DEVICE:
        return x
    elem = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device='meta')
    return FakeTensor(mode, elem, DEVICE)


class _Transfers(TorchDispatchMode):
    """Refuses blocking copies between host and device."""

    def __init__(self, allowed: bool) -> None:
        super().__init__()
        self.allowed = allowed

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.allowed and func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            asynchronous = kwargs.get('non_blocking', len(args) > 2 and args[2])
            if result.device.type == 'cpu' != source.device.type:
                raise HostWaitsError(f'a tensor of shape {tuple(source.shape)} is copied from the device')
            if source.device.type == 'cpu' != result.device.type and not asynchronous:
                raise HostWaitsError(
                    f'a tensor of shape {tuple(source.shape)} is copied to the device with non_blocking=False'
                )
        return result


def _contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return x if x.is_contiguous(memory_format=memory_format) else x.clone(memory_format=memory_format)


def _interpolate(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    like = torch.empty(x.shape, dtype=x.dtype, device='meta')
    return x.new_empty(F.interpolate(like, *args, **kwargs).shape)


# What asks for the device's driver, out of operations that do not.
REPLACED = {
    Tensor.contiguous: _contiguous,
    Tensor.copy_: torch.ops.aten.copy_.default,
    Tensor.__invert__: torch.logical_not,
    F.interpolate: _interpolate,
}


class _Bindings(TorchFunctionMode):
    """`REPLACED`, and `x[...]`, likewise out of operations that do not ask for the device's driver."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        on_device = args and isinstance(args[0], Tensor) and args[0].device.type == DEVICE.type
        if on_device and func in SHAPED_BY_VALUES:
            raise HostWaitsError(f'the shape of what {func.__name__} returns depends on values')
        if on_device and func in REPLACED:
            return REPLACED[func](*args, **(kwargs or {}))
        if not on_device or func not in (Tensor.__getitem__, Tensor.__setitem__):
            return func(*args, **(kwargs or {}))
        x, index, *value = args
        view, indices = _basic(x, index if isinstance(index, tuple) else (index,))
        for i in indices:
            if i is not None and i.device.type == 'cpu':
                raise HostWaitsError(f'a tensor of the device is indexed with one of the host, of shape {i.shape}')
        masked = any(map(_is_mask, indices))
        if not value:
            if masked:
                raise HostWaitsError('the shape of what x[mask] returns depends on values')
            return torch.ops.aten.index.Tensor(view, indices) if indices else view
        if not isinstance(value[0], Tensor):
            return None  # a constant, which is written without waiting
        if value[0].device.type == 'cpu':
            raise HostWaitsError(f'a tensor of the host, of shape {value[0].shape}, is assigned to one of the device')
        if masked:
            raise HostWaitsError('the shape of what x[mask] assigns depends on values')
        value[0].expand((torch.ops.aten.index.Tensor(view, indices) if indices else view).shape)
        return None


def _basic(x: Tensor, index: tuple) -> tuple[Tensor, list[Tensor | None]]:
    """Apply ints, slices, None and `...`; and what remains, tensors by dimension (empty if there are none)."""
    taken = sum(i.ndim if _is_mask(i) else 1 for i in index if i is not None and i is not ...)
    if not any(i is ... for i in index):
        index = (*index, ...)
    place = next(n for n, i in enumerate(index) if i is ...)
    index = (*index[:place], *(slice(None),) * (x.ndim - taken), *index[place + 1 :])
    indices: list[Tensor | None] = []
    for i in index:
        dim = sum(t.ndim if t is not None and _is_mask(t) else 1 for t in indices)
        if i is None:
            x = x.unsqueeze(dim)
            indices.append(None)
        elif isinstance(i, slice):
            start, stop, step = i.indices(x.shape[dim])
            x = torch.ops.aten.slice.Tensor(x, dim, start, stop, step)
            indices.append(None)
        elif isinstance(i, int):
            x = x.select(dim, i)
        else:
            indices.append(i if isinstance(i, Tensor) else torch.tensor(i))
    while indices and indices[-1] is None:
        indices.pop()
    return x, indices


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def on_device(value: Any) -> bool:
    """Whether all tensors, alone or nested in lists and dicts, are on the fake device."""
    tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return bool(tensors) and all(x.device == DEVICE for x in tensors)

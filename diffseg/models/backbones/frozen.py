"""Freezing of a pretrained network inside a trained model, and the base class of such backbones."""

import copy
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from logging import WARNING
from typing import Any, Literal

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from diffseg.captions import Captions


def freeze(module: nn.Module, trainable: Collection[str] = ()) -> None:
    """Convert parameters to non-persistent buffers, and make every buffer non-persistent.

    Such a tensor follows `.to()` and autocast as before, but is not seen by optimizers (mmengine passes them parameters
    without gradient as well), weight averages, gradient reduction or state dicts.

    Args:
        module: the network; changed in place.
        trainable: names of the parameters that are left unchanged.
    """
    for path, child in module.named_modules():
        if isinstance(child, _BatchNorm):
            child.track_running_stats = False  # or a state dict without its metadata would be given a counter
        tensors = [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
        for name, tensor in tensors:
            if (f'{path}.{name}' if path else name) not in trainable:
                delattr(child, name)
                child.register_buffer(name, tensor.detach(), persistent=False)


def reached(outputs: Iterable[Tensor]) -> set[Tensor]:
    """Leaves of the outputs' autograd graph, without computing a gradient."""
    leaves, seen = set(), set()
    nodes = [x.grad_fn for x in outputs if x.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            if hasattr(node, 'variable'):
                leaves.add(node.variable)
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return leaves


def verify_channels(layers: Sequence[str], channels: Sequence[int | None], expected: Sequence[int]) -> None:
    """Compare the channels of a config with those of the model.

    Args:
        layers: names of the layers, for the error message.
        channels: of each layer in the model; None if known only at run time.
        expected: channels in the config.

    Raises:
        ValueError: they differ.
    """
    if len(expected) != len(layers):
        raise ValueError(f'channels={list(expected)} has {len(expected)} entries for {len(layers)} layers')
    wrong = [
        f'{layer} has {in_model}, not {in_config}'
        for layer, in_model, in_config in zip(layers, channels, expected, strict=True)
        if in_model not in (None, in_config)
    ]
    if wrong:
        raise ValueError(f'channels do not match the model: {"; ".join(wrong)}. The right list is {list(channels)}')


def keep_device(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Restrict a function of `nn.Module._apply`, such as that of `.to()`, to the change of dtype."""
    return lambda tensor: tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).dtype)


def _pin(tensor: Tensor) -> Tensor:
    """Pin a tensor's memory if there is an accelerator, which copies pinned memory faster."""
    return tensor.pin_memory() if torch.accelerator.is_available() and tensor.device.type == 'cpu' else tensor


class FrozenBackbone(BaseModule):
    """Backbone around a pretrained network that stays in evaluation mode and is not saved in checkpoints.

    Checkpoints hold the fingerprint of the network instead, which is compared when one is loaded. A deep copy shares
    the network's buffers, to which `freeze` converts its frozen tensors.

    In distributed training the network's buffers are equal in all processes and need not be broadcast in every
    iteration: mmengine does not do so, but a config with `model_wrapper_cfg` does, unless it has
    `broadcast_buffers=False` (which `tools/train.py` adds).

    Args:
        check_fingerprint: reaction to another fingerprint in a checkpoint: 'error', or 'warn' if the difference does
            not matter, such as float32 instead of bfloat16.

    Attributes:
        network: the loaded network, a child module. It runs within `resident()`.
        fingerprint: settings that a head trained on the maps depends on, ready for JSON.
        offloaded: whether the network's buffers stay on their device and are copied to the images' device for a call.
        label: name of the backbone in error messages.
        optional: keys of the fingerprint that may be missing in a checkpoint.
    """

    network: nn.Module
    fingerprint: dict[str, Any]
    offloaded: bool = False
    label: str = 'backbone'
    captions: Captions | None = None
    optional: tuple[str, ...] = ()

    def __init__(self, check_fingerprint: Literal['error', 'warn'] = 'error') -> None:
        super().__init__()
        if check_fingerprint not in ('error', 'warn'):
            raise ValueError(f"check_fingerprint is {check_fingerprint!r}; it is 'error' or 'warn'")
        self.check_fingerprint = check_fingerprint

    def offload(self) -> None:
        """Keep the network's buffers where they are, with copies on the images' device only within `resident`.

        Parameters still move with the backbone, so that the references of optimizers stay valid.

        Raises:
            ValueError: gradient checkpointing is enabled, which needs the network in the backward pass.
        """
        if any(getattr(module, 'gradient_checkpointing', False) for module in self.network.modules()):
            raise ValueError(
                'gradient checkpointing runs the network again in the backward pass, when an offloaded network is not '
                'on the device; leave out one of the two'
            )
        self.offloaded = True
        for module, name, buffer in list(self._network_buffers()):
            setattr(module, name, _pin(buffer))

    @contextmanager
    def resident(self, device: torch.device) -> Iterator[None]:
        """Context with the network on `device`, through copies of its buffers if it is offloaded.

        Copies that a backward pass needs are kept until then.
        """
        visitors = list(self._network_buffers()) if self.offloaded else []
        try:
            for module, name, buffer in visitors:
                setattr(module, name, buffer.to(device, non_blocking=True))
            yield
        finally:
            for module, name, buffer in visitors:
                setattr(module, name, buffer)

    def _network_buffers(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        for module in self.network.modules():
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
                yield module, name, buffer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'FrozenBackbone':
        """Implement `.to()`, `.half()` and so on; an offloaded network's buffers change only their dtype."""
        resting = {id(buffer) for _, _, buffer in self._network_buffers()} if self.offloaded else set()
        stay = keep_device(fn)
        return super()._apply(lambda x: _pin(stay(x)) if id(x) in resting else fn(x), recurse)

    def train(self, mode: bool = True) -> 'FrozenBackbone':
        """Set the mode of everything but the network, which stays in evaluation mode.

        Training loops call this in every iteration, and networks have hundreds of modules: those that are in evaluation
        mode already are skipped.
        """
        self.training = mode
        for child in self.children():
            if child is not self.network:
                child.train(mode)
        if any(module.training for module in self.network.modules()):
            self.network.eval()
        return self

    def init_weights(self) -> None:
        """Do nothing: the loaded weights must not be initialised again."""

    def apply(self, fn: Callable[[nn.Module], None]) -> 'FrozenBackbone':
        """Apply `fn` to everything but the network: an `init_cfg` of the segmentor must not change loaded weights."""
        for child in self.children():
            if child is not self.network:
                child.apply(fn)
        fn(self)
        return self

    def get_extra_state(self) -> Tensor:
        """The fingerprint as a tensor of JSON bytes, since mmengine's weight averages expect tensors only."""
        return torch.tensor(list(json.dumps(self.fingerprint).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Compare the fingerprint of a checkpoint with that of the network.

        Raises:
            ValueError: they differ, unless `check_fingerprint` is 'warn'.
        """
        current, stored = self.fingerprint, json.loads(bytes(state.tolist()))
        required = [key for key in current if key in stored or key not in self.optional]
        different = [key for key in dict.fromkeys([*required, *stored]) if current.get(key) != stored.get(key)]
        if different:
            message = f'the checkpoint belongs to another {self.label}: ' + '; '.join(
                f'{key} was {stored.get(key)!r} and is {current.get(key)!r}' for key in different
            )
            if self.check_fingerprint == 'error':
                raise ValueError(
                    f"{message}. Use the settings of the checkpoint, train again, or set check_fingerprint='warn' in "
                    f'the backbone if the difference does not matter, such as float32 instead of bfloat16'
                )
            print_log(f"{message}. It is loaded nevertheless because of check_fingerprint='warn'", 'current', WARNING)

    def __deepcopy__(self, memo: dict[int, Any]) -> 'FrozenBackbone':
        """Copy everything but the frozen tensors, which the copy shares."""
        memo.update({id(buffer): buffer for buffer in self.network.buffers()})
        clone = memo[id(self)] = type(self).__new__(type(self))
        clone.__setstate__(copy.deepcopy(self.__dict__, memo))
        return clone

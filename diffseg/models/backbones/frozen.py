"""Freezing a pretrained network inside a model that mmengine trains, and what such a backbone has in common."""

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

from diffseg.captions import Captions


def freeze(module: nn.Module, trainable: Collection[str] = ()) -> None:
    """Turn parameters into buffers that are not saved, and mark every buffer as not saved.

    Such a tensor follows `.to()` and autocast as before, but nothing that deals with parameters meets it: no optimizer
    (mmengine's are given parameters that need no gradient as well), weight average, gradient reduction or state dict.

    Args:
        module: the network; changed in place.
        trainable: names of the parameters that stay what they are.
    """
    for path, child in module.named_modules():
        tensors = [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
        for name, tensor in tensors:
            if (f'{path}.{name}' if path else name) not in trainable:
                delattr(child, name)
                child.register_buffer(name, tensor.detach(), persistent=False)


def reached(outputs: Iterable[Tensor]) -> set[Tensor]:
    """The leaves that the outputs' gradients would reach, found by walking the graph without computing a gradient."""
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
    """Compare a config's channels with the model's.

    Args:
        layers: names of the layers, for the error.
        channels: what the model has for each layer; None where it is known at run time only.
        expected: what the config says.

    Raises:
        ValueError: they differ.
    """
    if len(expected) != len(layers):
        raise ValueError(f'channels={list(expected)} has {len(expected)} entries for {len(layers)} layers')
    wrong = [
        f'{layer} has {ours}, not {theirs}'
        for layer, ours, theirs in zip(layers, channels, expected, strict=True)
        if ours not in (None, theirs)
    ]
    if wrong:
        raise ValueError(f'channels do not match the model: {"; ".join(wrong)}. The right list is {list(channels)}')


def keep_device(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Of what `nn.Module._apply` does to tensors, such as `.to()`, the change of dtype alone."""
    return lambda tensor: tensor.to(fn(tensor.new_empty(0)).dtype)


def _pin(tensor: Tensor) -> Tensor:
    """Lock a tensor's memory, where there is an accelerator that reads such memory faster."""
    return tensor.pin_memory() if torch.accelerator.is_available() and tensor.device.type == 'cpu' else tensor


class FrozenBackbone(BaseModule):
    """A backbone around a loaded network that stays in evaluation mode and out of checkpoints.

    Checkpoints hold the fingerprint of the network instead, and loading one compares the two. A deep copy shares the
    network's buffers, which is what `freeze` makes of its frozen tensors.

    In distributed training the network's buffers are the same everywhere and need not be sent around in every
    iteration: mmengine does not do so, but a config's own `model_wrapper_cfg` does, unless it has
    `broadcast_buffers=False` (which `tools/train.py` adds).

    Args:
        check_fingerprint: what follows where a checkpoint's fingerprint differs: 'error', or 'warn' where the
            difference does not matter, as float32 in place of bfloat16.

    Attributes:
        network: the loaded network, a child module. It runs within `resident()`.
        fingerprint: what a head that was trained on the maps takes for granted, in types that JSON has.
        offloaded: whether the network's buffers stay where they are and only visit the images' device.
        label: what errors call the backbone.
        optional: keys of the fingerprint that a checkpoint's may lack.
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
        """From now on, keep the network's buffers where they are, and have copies on the device only within `resident`.

        Parameters move with the backbone as ever, so that optimizers keep what they were given.

        Raises:
            ValueError: parts of the network are to be recomputed in the backward pass, when they are gone again.
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
        """Have the network on `device`: at once if it is not offloaded, else through copies of its buffers.

        Copies that a backward pass needs live until then.
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
        """What `.to()`, `.half()` and so on do; of an offloaded network's buffers, only the dtype follows."""
        resting = {id(buffer) for _, _, buffer in self._network_buffers()} if self.offloaded else set()
        stay = keep_device(fn)
        return super()._apply(lambda x: _pin(stay(x)) if id(x) in resting else fn(x), recurse)

    def train(self, mode: bool = True) -> 'FrozenBackbone':
        """Set the mode of all but the network, which stays in evaluation mode.

        Training loops call this in every iteration, and networks have hundreds of modules: those that are in evaluation
        mode already are not set again.
        """
        self.training = mode
        for child in self.children():
            if child is not self.network:
                child.train(mode)
        if any(module.training for module in self.network.modules()):
            self.network.eval()
        return self

    def init_weights(self) -> None:
        """Do nothing: the network is loaded, and none of its parts may initialise itself again."""

    def apply(self, fn: Callable[[nn.Module], None]) -> 'FrozenBackbone':
        """Apply `fn` to all but the network: an `init_cfg` of the segmentor must not reach the loaded weights."""
        for child in self.children():
            if child is not self.network:
                child.apply(fn)
        fn(self)
        return self

    def get_extra_state(self) -> Tensor:
        """The fingerprint as JSON in bytes, since mmengine's weight averages take every entry for a tensor."""
        return torch.tensor(list(json.dumps(self.fingerprint).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Compare a checkpoint's fingerprint with the network at hand.

        Raises:
            ValueError: they differ, unless `check_fingerprint` is 'warn'.
        """
        ours, theirs = self.fingerprint, json.loads(bytes(state.tolist()))
        required = [key for key in ours if key in theirs or key not in self.optional]
        different = [key for key in dict.fromkeys([*required, *theirs]) if ours.get(key) != theirs.get(key)]
        if different:
            message = f'the checkpoint belongs to another {self.label}: ' + '; '.join(
                f'{key} was {theirs.get(key)!r} and is {ours.get(key)!r}' for key in different
            )
            if self.check_fingerprint == 'error':
                raise ValueError(
                    f"{message}. Build the backbone as it was, train anew, or set check_fingerprint='warn' in the "
                    f'backbone if the difference does not matter, as that of float32 and bfloat16'
                )
            print_log(f"{message}. It is loaded all the same, by check_fingerprint='warn'", 'current', WARNING)

    def __deepcopy__(self, memo: dict[int, Any]) -> 'FrozenBackbone':
        """Copy all but the frozen tensors, which the copy shares."""
        memo.update({id(buffer): buffer for buffer in self.network.buffers()})
        clone = memo[id(self)] = type(self).__new__(type(self))
        clone.__setstate__(copy.deepcopy(self.__dict__, memo))
        return clone

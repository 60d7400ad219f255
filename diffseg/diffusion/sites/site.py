"""A place in a network where an activation can be read, and what describes a kind of network."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from diffseg.geometry import map_size


@dataclass(frozen=True)
class Site:
    """A place in a network where an activation can be read.

    Attributes:
        name: GDF's name.
        path: The module, inside the network, that the activation belongs to.
        channels: Of the activation; None for an attention map whose number of keys is not known.
        stride: Image pixels per cell, where the sides of the image are multiples of it.
        kind: What the module gives: 'spatial' (B,C,h,w), 'tokens' (B,h*w,C), 'input' (the module's input is read, with
            shape (B,C,h,w)) or 'map' (attention, recomputed from the module's queries and keys).
    """

    name: str
    path: str
    channels: int | None
    stride: int
    kind: Literal['input', 'spatial', 'tokens', 'map'] = 'spatial'

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the activation for an image of `height` x `width` pixels."""
        return map_size((height, width), self.stride)


@dataclass(frozen=True)
class NetworkKind:
    """What can be read in the networks of one class.

    Attributes:
        network: The class, of diffusers.
        vae_scale_factor: Image pixels per cell of the network's input, unless a model says otherwise.
        walk: Lists the sites of a network whose input has a given stride, in order of execution.
        block: Pattern of the beginning of the names of one decoder block, which the aliases count.
        block_aliases: What the output of decoder block i is also called: `{alias}-{i}`.
    """

    network: type[nn.Module]
    vae_scale_factor: int
    walk: Callable[[nn.Module, int], Iterator[Site]]
    block: str
    block_aliases: tuple[str, ...]

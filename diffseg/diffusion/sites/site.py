"""A place in a network where an activation can be read, and what describes a kind of network."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from diffseg.diffusion.sites.tokens import TokenOrder
from diffseg.geometry import map_size


class AttentionProbe(NamedTuple):
    """How the probabilities of an attention module are read off by calling it again with values that mark the keys.

    Attributes:
        values: The module, inside the network, whose output holds the values of these keys.
        keys: Which of its tokens are the keys: 'text' or 'image', or 'all'.
        others: Modules whose output holds values of other keys.
        output: The module whose input is the weighted values; '' for what the attention module returns.
        width: Channels of the queries, all heads together.
        values_part: Which slice of `width` channels the values are; None for all channels.
    """

    values: str
    keys: Literal['text', 'image', 'all']
    others: tuple[str, ...]
    output: str
    width: int
    values_part: int | None = None


@dataclass(frozen=True)
class Site:
    """A place in a network where an activation can be read.

    Attributes:
        name: GDF's name.
        path: The module, inside the network, that the activation belongs to.
        channels: Of the activation; None for an attention map whose number of keys is not known.
        stride: Image pixels per cell, where the sides of the image are multiples of it.
        kind: What is read there: 'spatial' (B,C,h,w), 'tokens' (B,N,C), 'patches' (tokens that hold the pixels of a
            patch each, in the order (p,p,C)) or 'map' (attention).
        is_input: The module's first positional argument is read, and not its output.
        item: Which one is read of several outputs.
        order: What the tokens are.
        part: Which slice of `channels` channels is read, where one tensor holds several activations; None for all.
        block: The block that the site is in; '' where it is of no matter.
        norm: For a block's modulated input, the module that normalises the raw one; '' for others.
        probe: For a map that is not recomputed from queries and keys, how it is read off.
    """

    name: str
    path: str
    channels: int | None
    stride: int
    kind: Literal['spatial', 'tokens', 'patches', 'map'] = 'spatial'
    is_input: bool = False
    item: int = 0
    order: TokenOrder = 'image'
    part: int | None = None
    block: str = ''
    norm: str = ''
    probe: AttentionProbe | None = None

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the activation for an image of `height` x `width` pixels."""
        return map_size((height, width), self.stride)


def _call(network: nn.Module, x_t: Tensor, timestep: Tensor | float, **kwargs: Any) -> Any:
    return network(x_t, timestep, return_dict=False, **kwargs)


@dataclass(frozen=True)
class NetworkKind:
    """What can be read in the networks of one class, and how they are called.

    Attributes:
        network: The class, of diffusers.
        vae_scale_factor: Image pixels per cell of the latent, or of the image in a network of pixels, unless a model
            says otherwise.
        walk: Lists the sites of a network for a given number of image pixels per cell, in order of execution.
        block: Pattern of the beginning of the names of one decoder block, which the aliases count.
        block_aliases: What the output of decoder block i is also called: `{alias}-{i}`.
        call: Calls a network with `x_t`, `timestep` and keyword arguments.
        patch_size: Height and width of a token in cells.
        packed: Whether the network takes tokens (B,N,C), which do not tell their grid.
        part: The folder of such a network in diffusers' layout, 'unet' or 'transformer'; `{part}-out` is the site where
            its prediction is read.
        text_mask: The keyword argument, with shape (B,N) and 1 for tokens, that tells how many text tokens a row has
            (in the order 'text-image-padding'); '' for other networks.
    """

    network: type[nn.Module]
    vae_scale_factor: int
    walk: Callable[[nn.Module, int], Iterator[Site]]
    block: str = ''
    block_aliases: tuple[str, ...] = ()
    call: Callable[..., Any] = _call
    patch_size: Callable[[nn.Module], int] = lambda network: 1
    packed: bool = False
    text_mask: str = ''
    part: Literal['unet', 'transformer'] = 'unet'

"""What diffusion transformers have in common: stacks of blocks that work on tokens of patches, and of text."""

from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from diffseg.diffusion.sites.site import AttentionProbe, NetworkKind, Site
from diffseg.diffusion.sites.tokens import TokenOrder


class BlockSite(NamedTuple):
    """An activation inside a transformer block.

    Attributes:
        name: The end of its name.
        path: Its module inside the block; '' is the block itself.
        channels: The attribute of the block that holds its number of channels.
        fields: Other fields of its `Site`, with paths inside the block. `order` among them goes before the stack's.
        needs: A submodule that not every block has; without it there is no such site.
    """

    name: str
    path: str
    channels: str
    fields: Mapping[str, Any] = {}
    needs: str = ''


class BlockMap(NamedTuple):
    """The attention map of a transformer block. Paths are inside the block; see `AttentionProbe` for most of them.

    Attributes:
        name: The end of its name.
        path: The attention module.
        keys: As in the probe.
        values: As in the probe.
        others: As in the probe.
        output: As in the probe.
        width: The attribute of the block that holds the probe's.
        values_part: As in the probe.
        needs: As in `BlockSite`.
    """

    name: str
    path: str
    keys: Literal['text', 'image', 'all']
    values: str
    width: str
    output: str
    others: tuple[str, ...] = ()
    values_part: int | None = None
    needs: str = ''


class Stack(NamedTuple):
    """Transformer blocks of one class, which are executed one after another.

    Attributes:
        container: The network's attribute that holds them.
        sites: What can be read in each of them, in order of execution.
        order: The tokens that they work on.
        prefix: The beginning of their names. Blocks are counted through all stacks of one prefix.
    """

    container: str
    sites: tuple[BlockSite | BlockMap, ...]
    order: TokenOrder = 'image'
    prefix: str = ''


class Head(NamedTuple):
    """The last linear layer, whose output is the prediction.

    Attributes:
        path: Of the layer, or a function that finds it in a network.
        order: Its tokens.
    """

    path: str | Callable[[nn.Module], str] = 'proj_out'
    order: TokenOrder = 'image'


def one_timestep_each(x_t: Tensor, timestep: Tensor | float) -> Tensor:
    """One timestep for each latent: shape (B,)."""
    return torch.as_tensor(timestep, device=x_t.device).expand(len(x_t))


def _call(network: nn.Module, x_t: Tensor, timestep: Tensor | float, **kwargs: Any) -> Any:
    return network(hidden_states=x_t, timestep=one_timestep_each(x_t, timestep), return_dict=False, **kwargs)


def transformer_kind(
    network: type[nn.Module],
    stacks: tuple[Stack, ...],
    head: Head = Head(),  # noqa: B008 (immutable)
    vae_scale_factor: int = 8,
    patch_size: Callable[[nn.Module], int] = attrgetter('config.patch_size'),
    packed: bool = False,
    call: Callable[..., Any] = _call,
    text_mask: str = '',
) -> NetworkKind:
    """Describe a class of transformers.

    Args:
        network: The class, of diffusers.
        stacks: Its blocks, in order of execution.
        head: Its prediction. A patch's pixels come in the order (p,p,C), unless the network is packed.
        vae_scale_factor: As in `NetworkKind`.
        patch_size: As in `NetworkKind`.
        packed: As in `NetworkKind`.
        call: As in `NetworkKind`.
        text_mask: As in `NetworkKind`.
    """

    def walk(module: nn.Module, stride: int) -> Iterator[Site]:
        patch = patch_size(module)
        counts: dict[str, int] = {}
        for stack in stacks:
            for i, block in enumerate(getattr(module, stack.container)):
                b = counts.get(stack.prefix, 0)
                counts[stack.prefix] = b + 1
                name, path = f'{stack.prefix}vit-block{b}', f'{stack.container}.{i}'
                yield from _walk_block(stack, name, path, block, stride * patch)
        path = head.path if isinstance(head.path, str) else head.path(module)
        channels = module.get_submodule(path).out_features
        if packed:
            yield Site('transformer-out', path, channels, stride * patch, 'tokens', order=head.order)
        else:
            yield Site('transformer-out', path, channels // patch**2, stride, 'patches', order=head.order)

    return NetworkKind(
        network,
        vae_scale_factor,
        walk,
        call=call,
        patch_size=patch_size,
        packed=packed,
        text_mask=text_mask,
        part='transformer',
    )


def _walk_block(stack: Stack, name: str, path: str, block: nn.Module, stride: int) -> Iterator[Site]:
    for site in stack.sites:
        if site.needs and getattr(block, site.needs, None) is None:
            continue
        if isinstance(site, BlockMap):
            width = attrgetter(site.width)(block)
            values, output = f'{path}.{site.values}', site.output and f'{path}.{site.output}'
            others = tuple(f'{path}.{other}' for other in site.others)
            probe = AttentionProbe(values, site.keys, others, output, width, site.values_part)
            module = f'{path}.{site.path}'
            yield Site(f'{name}-{site.name}', module, None, stride, 'map', order=stack.order, probe=probe)
        else:
            fields = {'kind': 'tokens', 'order': stack.order, 'block': path, **site.fields}
            if norm := fields.get('norm'):
                fields['norm'] = f'{path}.{norm}'
            module = f'{path}.{site.path}' if site.path else path
            yield Site(f'{name}-{site.name}', module, attrgetter(site.channels)(block), stride, **fields)

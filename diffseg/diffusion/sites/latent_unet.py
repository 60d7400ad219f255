"""What can be read in a UNet of latents and prompts, diffusers' `UNet2DConditionModel`."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Literal, NamedTuple

from diffusers import UNet2DConditionModel
from torch import nn

from diffseg.diffusion.sites.site import NetworkKind, Site
from diffseg.diffusion.sites.unet import walk_unet


class _BlockSite(NamedTuple):
    """A site inside a transformer block: the end of its name, its module and, as attribute of the block, its width."""

    name: str
    path: str
    channels: str | None
    kind: Literal['tokens', 'map'] = 'tokens'


# of diffusers' `BasicTransformerBlock`, in order of execution
TRANSFORMER_BLOCK = (
    _BlockSite('self-q', '.attn1.to_q', 'attn1.inner_dim'),
    _BlockSite('self-k', '.attn1.to_k', 'attn1.inner_dim'),
    _BlockSite('self-v', '.attn1.to_v', 'attn1.inner_dim'),
    _BlockSite('self-map', '.attn1', None, 'map'),
    _BlockSite('cross-q', '.attn2.to_q', 'attn1.inner_dim'),
    _BlockSite('cross-map', '.attn2', None, 'map'),
    _BlockSite('ffn-inner', '.ff.net.0', 'ff.net.2.in_features'),
    _BlockSite('out', '', 'attn1.inner_dim'),
)


def _has(block: nn.Module, name: str) -> bool:
    if name in ('self-k', 'self-v'):
        return not block.only_cross_attention  # else they are the prompt's
    return block.attn2 is not None or not name.startswith('cross')


def _walk_transformers(name: str, path: str, attention: nn.Module, stride: int) -> Iterator[Site]:
    for b, block in enumerate(getattr(attention, 'transformer_blocks', ())):
        for site in TRANSFORMER_BLOCK:
            if _has(block, site.name):
                channels = None if site.channels is None else attrgetter(site.channels)(block)
                block_path = f'{path}.transformer_blocks.{b}{site.path}'
                yield Site(f'{name}-block{b}-{site.name}', block_path, channels, stride, site.kind)


def _walk(unet: UNet2DConditionModel, stride: int) -> Iterator[Site]:
    return walk_unet(unet, stride, _walk_transformers)


LATENT_UNET = NetworkKind(UNet2DConditionModel, 8, _walk, block=r'up-level\d+', block_aliases=('dift',))

"""Aggregated attention: maps of several layers as one activation."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from diffseg.diffusion.sites.names import refuse_string
from diffseg.diffusion.sites.site import Site

ATTENTION = 'attn'  # the name of aggregated attention maps, or its beginning
ATTENTION_CATEGORIES = tuple(f'{part}_{kind}' for part in ('down', 'mid', 'up') for kind in ('cross', 'self'))
# The strides of the layers whose attention is aggregated, in latent cells: GDF takes those between 1/32 and 1/16 of the
# image size, VPD those of at most 1/16.
ATTENTION_STRIDES = {'concat': (2, 4), 'average': (2, math.inf)}

AttentionMode = Literal['concat', 'average']


class Aggregate(NamedTuple):
    """Attention maps as one activation.

    Attributes:
        site: Its name, channels and stride.
        groups: Layers, one list for each group. Those of a group are averaged, and the groups are resized to `site`'s
            stride and concatenated.
    """

    site: Site
    groups: list[list[Site]]


def aggregates(
    available: Mapping[str, Site],
    categories: Sequence[str],
    mode: AttentionMode = 'concat',
    tokens: int | None = None,
) -> list[Aggregate]:
    """Describe aggregated attention: probabilities, averaged over heads and layers.

    With 'concat', as GDF has it, everything is in one activation 'attn' of the latent's size: for each category and,
    within it, each size (1/2 and 1/4 of the latent's, in order of execution) the average over layers, resized
    (nearest). With 'average', as VPD has it, there is one activation for each size (1/2 of the latent's and smaller),
    the average over the layers of all categories: 'attn-16', 'attn-32', ..., named after their strides, fine first.

    Args:
        available: The network's sites, as `sites` gives them.
        categories: Out of `{down,mid,up}_{cross,self}`.
        mode: 'concat' or 'average'.
        tokens: Of the prompt, the keys of cross-attention.

    Raises:
        ValueError: An unknown category or mode, attention that the network does not have, an average of cross- and
            self-attention, whose keys are not the same, or a network that is no UNet.
    """
    refuse_string('attention', categories)
    if mode not in ATTENTION_STRIDES:
        raise ValueError(f'attention mode is {mode!r}; it is {" or ".join(map(repr, ATTENTION_STRIDES))}')
    if not categories:
        return []
    if 'unet-in' not in available:
        raise ValueError(
            f'attention {list(categories)} is aggregated over the levels of a UNet, which this network does not have; '
            'read its maps by their names, which end with -cross-map and -self-map'
        )
    latent = available['unet-in'].stride
    finest, coarsest = (latent * stride for stride in ATTENTION_STRIDES[mode])
    layers = {category: _attention_layers(category, available.values(), finest, coarsest) for category in categories}
    kinds = {category.partition('_')[2] for category in categories}
    if mode == 'average' and len(kinds) > 1:
        raise ValueError(f'{list(categories)} cannot be averaged: cross- and self-attention have different keys')

    def describe(name: str, stride: int, groups: list[list[Site]]) -> Aggregate:
        channels = tokens * len(groups) if tokens and kinds == {'cross'} else None
        return Aggregate(Site(name, '', channels, stride, 'map'), groups)

    if mode == 'concat':
        groups = [group for members in layers.values() for group in _by_stride(members).values()]
        return [describe(ATTENTION, latent, groups)]
    by_stride = _by_stride([site for members in layers.values() for site in members])
    return [describe(f'{ATTENTION}-{stride}', stride, [by_stride[stride]]) for stride in sorted(by_stride)]


def _attention_layers(category: str, available: Iterable[Site], finest: float, coarsest: float) -> list[Site]:
    """The maps of one category, in order of execution, whose strides are within bounds."""
    if category not in ATTENTION_CATEGORIES:
        raise ValueError(f'unknown attention {category!r}; there are: {", ".join(ATTENTION_CATEGORIES)}')
    part, kind = category.split('_')
    maps = [site for site in available if site.name.startswith(f'{part}-') and site.name.endswith(f'-{kind}-map')]
    if layers := [site for site in maps if finest <= site.stride <= coarsest]:
        return layers
    raise ValueError(
        f'attention {category!r} is empty: this network has none there at strides of {finest} to {coarsest} pixels'
    )


def _by_stride(layers: Sequence[Site]) -> dict[int, list[Site]]:
    """Sites grouped by stride, strides and sites in the order in which they come."""
    by_stride: dict[int, list[Site]] = {}
    for site in layers:
        by_stride.setdefault(site.stride, []).append(site)
    return by_stride

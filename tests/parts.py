"""What configs are made of: their backbones, and the maps that these give."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from diffseg.diffusion.loading import meta_network
from diffseg.diffusion.sites import Site, resolve, sites
from diffseg.models.backbones.vision import load_vision_config


def members(backbone: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The backbones that an ensemble is made of, or the one that there is."""
    return backbone.get('backbones') or [backbone]


@cache
def sites_of(model: str) -> dict[str, Site]:
    """A model's own description. Read only."""
    return sites(meta_network(model))


def described(backbone: Mapping[str, Any], height: int, width: int) -> Iterator[Tensor]:
    """Maps of two images on the meta device, with the shapes that the model's own description gives."""
    size = backbone.get('input_size')
    height, width = (size, size) if size else (height, width)
    if backbone.type == 'MetaPromptsBackbone':
        for stride in (4, 8, 16, 32):
            yield torch.empty(2, backbone.num_prompts, height // stride, width // stride, device='meta')
        return
    if backbone.type == 'VisionBackbone':
        vit = load_vision_config(backbone.model)
        assert backbone.channels == [vit.hidden_size] * len(backbone.layers)
        for channels in backbone.channels:
            yield torch.empty(2, channels, -(-height // vit.patch_size), -(-width // vit.patch_size), device='meta')
        return
    available = sites_of(backbone.model)
    names = [*backbone.layers, *['attn'] * (len(backbone.channels) - len(backbone.layers))]
    for name, channels in zip(resolve(names, [*available, *names]), backbone.channels, strict=True):
        if attention := re.fullmatch(r'attn(-(\d+))?', name):
            site = Site(name, '', None, int(attention[2] or 8), 'map')
        else:
            site = available[name]
        assert site.channels in (None, channels), f'{name} has {site.channels} channels'
        yield torch.empty(2, len(backbone.timesteps) * channels, *site.size(height, width), device='meta')

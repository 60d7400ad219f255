"""What can be read inside a UNet, and reading it.

Every readable activation is a `Site`; `sites` lists those of a network under the names of "Not All Diffusion Model
Activations Have Been Evaluated as Discriminative Features" (its code is generic-diffusion-feature, GDF), 197 for Stable
Diffusion 1.5 and 612 for SDXL. `ActivationRecorder` reads them with forward hooks.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal, NamedTuple

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

ATTENTION = 'attn'  # the name of aggregated attention maps, or its beginning
ATTENTION_CATEGORIES = tuple(f'{part}_{kind}' for part in ('down', 'mid', 'up') for kind in ('cross', 'self'))
# The strides of the layers whose attention is aggregated, in latent cells: GDF takes those between 1/32 and 1/16 of the
# image size, VPD those of at most 1/16.
ATTENTION_STRIDES = {'concat': (2, 4), 'average': (2, math.inf)}

AttentionMode = Literal['concat', 'average']
UNet = UNet2DConditionModel | UNet2DModel  # of latents and prompts, or of pixels alone


@dataclass(frozen=True)
class Site:
    """A place in a UNet where an activation can be read.

    Attributes:
        name: GDF's name.
        path: The module, inside the UNet, that the activation belongs to.
        channels: Of the activation; None for a map whose number of keys is not known.
        stride: Image pixels per cell.
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
        return -(-height // self.stride), -(-width // self.stride)


def sites(unet: UNet, vae_scale_factor: int | None = None) -> dict[str, Site]:
    """List everything that can be read inside a UNet, in order of execution.

    No forward pass is made, so the UNet may be on the meta device. The names (spec of GDF, all indices from 0):

    * `unet-in`, `unet-after-conv-in`, `unet-out`
    * `{down,up}-level{L}-repeat{R}-res-{increment,out}`: a residual block before and after adding its shortcut
    * `{down,up}-level{L}-repeat{R}-vit-block{B}-{self-q,self-k,self-v,self-map,cross-q,cross-map,ffn-inner,out}`
    * `{down,up}-level{L}-repeat{R}-vit-out`
    * `down-level{L}-downsampler-out`, `up-level{L}-upsampler-out`
    * `mid-repeat{R}-res-...`, `mid-vit-...`

    Of a network of pixels, whose attention is not inside transformers, `vit-out` is all that there is of it.

    Args:
        unet: The network.
        vae_scale_factor: Image pixels per latent cell; None is 8, and 1 for a network of pixels.
    """
    return {site.name: site for site in _walk(unet, vae_scale_factor or default_scale_factor(unet))}


def default_scale_factor(unet: UNet) -> int:
    """Image pixels per cell of what the network reads: 1 without a VAE, else that of Stable Diffusion's, 8."""
    return 1 if isinstance(unet, UNet2DModel) else 8


def _walk(unet: UNet, stride: int) -> Iterator[Site]:
    yield Site('unet-in', 'conv_in', unet.config.in_channels, stride, 'input')
    yield Site('unet-after-conv-in', 'conv_in', unet.config.block_out_channels[0], stride)
    for level, block in enumerate(unet.down_blocks):
        name, path = f'down-level{level}', f'down_blocks.{level}'
        yield from _walk_block(name, path, block, stride)
        if block.downsamplers is not None:
            stride *= 2
            channels = block.resnets[-1].out_channels
            yield Site(f'{name}-downsampler-out', f'{path}.downsamplers.0', channels, stride)
    if unet.mid_block is not None:
        yield from _walk_block('mid', 'mid_block', unet.mid_block, stride)
    for level, block in enumerate(unet.up_blocks):
        name, path = f'up-level{level}', f'up_blocks.{level}'
        yield from _walk_block(name, path, block, stride)
        if block.upsamplers is not None:
            stride //= 2
            channels = block.resnets[-1].out_channels
            yield Site(f'{name}-upsampler-out', f'{path}.upsamplers.0', channels, stride)
    yield Site('unet-out', 'conv_out', unet.config.out_channels, stride)


def _walk_block(name: str, path: str, block: nn.Module, stride: int) -> Iterator[Site]:
    attentions = dict(enumerate(getattr(block, 'attentions', ())))  # fewer than residual blocks in the middle
    for repeat, resnet in enumerate(block.resnets):
        channels = resnet.out_channels
        yield Site(f'{name}-repeat{repeat}-res-increment', f'{path}.resnets.{repeat}.conv2', channels, stride)
        yield Site(f'{name}-repeat{repeat}-res-out', f'{path}.resnets.{repeat}', channels, stride)
        if attentions.get(repeat) is None:
            continue
        vit, vit_path = 'mid-vit' if name == 'mid' else f'{name}-repeat{repeat}-vit', f'{path}.attentions.{repeat}'
        for b, transformer in enumerate(getattr(attentions[repeat], 'transformer_blocks', ())):
            yield from _walk_transformer(f'{vit}-block{b}', f'{vit_path}.transformer_blocks.{b}', transformer, stride)
        yield Site(f'{vit}-out', vit_path, channels, stride)


def _walk_transformer(name: str, path: str, block: nn.Module, stride: int) -> Iterator[Site]:
    channels = block.attn1.inner_dim
    yield Site(f'{name}-self-q', f'{path}.attn1.to_q', channels, stride, 'tokens')
    if not block.only_cross_attention:  # else its keys and values are the text's
        yield Site(f'{name}-self-k', f'{path}.attn1.to_k', channels, stride, 'tokens')
        yield Site(f'{name}-self-v', f'{path}.attn1.to_v', channels, stride, 'tokens')
    yield Site(f'{name}-self-map', f'{path}.attn1', None, stride, 'map')
    if block.attn2 is not None:
        yield Site(f'{name}-cross-q', f'{path}.attn2.to_q', channels, stride, 'tokens')
        yield Site(f'{name}-cross-map', f'{path}.attn2', None, stride, 'map')
    yield Site(f'{name}-ffn-inner', f'{path}.ff.net.0', block.ff.net[2].in_features, stride, 'tokens')
    yield Site(f'{name}-out', path, channels, stride, 'tokens')


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
        ValueError: An unknown category or mode, attention that the network does not have, or an average of cross- and
            self-attention, whose keys are not the same.
    """
    if mode not in ATTENTION_STRIDES:
        raise ValueError(f'attention mode is {mode!r}; it is {" or ".join(map(repr, ATTENTION_STRIDES))}')
    if not categories:
        return []
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


def resolve(names: Sequence[str], available: Iterable[str]) -> list[str]:
    """Translate aliases and check names.

    The aliases are `dift-{n}`, the output of decoder block n with its upsampler (DIFT's `up_ft_index`), and
    `dhf-{level}-{repeat}`, a residual increment of the decoder (the layers of Diffusion Hyperfeatures). In a network
    of pixels `adm-{i}` is guided-diffusion's `output_blocks.i`: a residual block of the decoder, counted through all
    levels, with the attention and the upsampler behind it; there `dift-{i}` means the same, as in DIFT.

    Args:
        names: Names of sites or aliases.
        available: The network's names in order of execution, as `sites` gives them.

    Returns:
        The names of sites in the order asked for.

    Raises:
        ValueError: For an unknown name, with the nearest known ones, or for one site asked for twice.
    """
    available = list(available)
    known = aliases(available)
    resolved = [
        known.get(name) or re.sub(r'^dhf-(\d+)-(\d+)$', r'up-level\1-repeat\2-res-increment', name) for name in names
    ]
    for asked, name in zip(names, resolved, strict=True):
        if name not in available:
            raise ValueError(f'unknown activation {asked!r}; {nearest(name, available)}')
        if resolved.count(name) > 1:
            raise ValueError(f'activation {name!r} is asked for twice')
    return resolved


def nearest(name: str, available: Sequence[str]) -> str:
    """End an error message: the five names that share most with an unknown name or pattern."""

    def likeness(known: str) -> tuple[int, int]:
        return sum(block.size for block in SequenceMatcher(None, name, known).get_matching_blocks()), -len(known)

    return f'the nearest of {len(available)} are: {", ".join(sorted(available, key=likeness, reverse=True)[:5])}'


def aliases(available: Iterable[str]) -> dict[str, str]:
    """What each alias stands for in a network, see `resolve`; those of one kind in order of execution.

    Args:
        available: The network's names in order of execution.
    """
    available = list(available)
    pixels = not any('-vit-block' in site for site in available)  # no transformers, so no prompts either
    outputs = _outputs(available, r'up-level\d+-repeat\d+' if pixels else r'up-level\d+')
    kinds = ('adm', 'dift') if pixels else ('dift',)
    blocks = {f'{kind}-{i}': output for kind in kinds for i, output in enumerate(outputs)}
    increments = (re.fullmatch(r'up-level(\d+)-repeat(\d+)-res-increment', name) for name in available)
    return blocks | {f'dhf-{found[1]}-{found[2]}': found[0] for found in increments if found}


def _outputs(available: Iterable[str], block: str) -> list[str]:
    """What each block of the decoder executes last; the beginnings of its names match `block`, or it began before."""
    outputs, current = {}, ''
    for name in available:
        if name.startswith('up-'):
            found = re.match(block, name)
            current = found[0] if found else current
            outputs[current] = name
    return list(outputs.values())


class _Tap(NamedTuple):
    """What one hook stores: the output of the module at `path`, or its input."""

    path: str
    is_input: bool = False


class _Stop(Exception):
    """Ends a forward pass whose remainder nobody needs."""


class ActivationRecorder:
    """Reads activations from a UNet's forward pass.

    The hooks live for one call only, and the UNet keeps no trace of them. Attention maps are recomputed from queries
    and keys, so that it does not matter which attention processor runs.

    Args:
        unet: The network.
        names: Sites to read, or aliases, see `resolve`.
        stop_early: End the forward pass with the last activation that is wanted. With gradient checkpointing in use it
            runs to its end all the same, since checkpointed modules must not be left by an exception.
        attention: Categories of aggregated attention, which is returned after `names`, see `aggregates`.
        attention_mode: How it is aggregated, 'concat' or 'average'.
        vae_scale_factor: Image pixels per latent cell, which strides and so some names tell; None as in `sites`.

    Raises:
        ValueError: For names that the UNet does not have.
    """

    def __init__(
        self,
        unet: UNet,
        names: Sequence[str],
        stop_early: bool = True,
        attention: Sequence[str] = (),
        attention_mode: AttentionMode = 'concat',
        vae_scale_factor: int | None = None,
    ) -> None:
        available = sites(unet, vae_scale_factor)
        self.unet = unet
        self.vae_scale_factor = vae_scale_factor or default_scale_factor(unet)
        self.stop_early = stop_early
        self.sites = [available[name] for name in resolve(names, available)]
        self.aggregates = aggregates(available, attention, attention_mode)
        self.taps = {tap for site in self._all_sites() for tap in _taps(site)}

    def _all_sites(self) -> list[Site]:
        return [*self.sites, *(site for _, groups in self.aggregates for group in groups for site in group)]

    def __call__(
        self,
        x_t: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        **unet_kwargs: Any,
    ) -> dict[str, Tensor]:
        """Run the UNet and return what was asked for.

        Gradients flow through the activations when gradient mode is on.

        Args:
            x_t: Noised latent with shape (B, 4, h, w), of any size that the UNet takes; or image (B, 3, h, w).
            timestep: The scheduler's own index, one or (B,).
            encoder_hidden_states: Text embedding with shape (B, N, D), for networks that read one.
            added_cond_kwargs: SDXL's `text_embeds` and `time_ids`.
            unet_kwargs: Passed on to the UNet.

        Returns:
            The activations in the order asked for, each with shape (B, C, h', w') and in the UNet's dtype. A map is the
            mean over heads, its channels are the keys. 'unet-out' is the predicted noise (or velocity).

        Raises:
            ValueError: For attention masks together with maps, which are recomputed without them.
            RuntimeError: If the UNet did not execute a module that is to be read.
        """
        masked = any(unet_kwargs.get(name) is not None for name in ('attention_mask', 'encoder_attention_mask'))
        if masked and any(site.kind == 'map' for site in self._all_sites()):
            raise ValueError('attention maps cannot be read under an attention mask; ask for other activations')
        told = {'encoder_hidden_states': encoder_hidden_states, 'added_cond_kwargs': added_cond_kwargs}
        unet_kwargs |= {name: value for name, value in told.items() if value is not None}
        raw = self._run(x_t, timestep, **unet_kwargs)
        height, width = (side * self.vae_scale_factor for side in x_t.shape[-2:])
        read = {site.name: self._read(site, raw, (height, width)) for site in self.sites}
        for site, groups in self.aggregates:
            maps = [self._average(group, raw, (height, width)) for group in groups]
            resized = [F.interpolate(x, size=site.size(height, width)) for x in maps]
            read[site.name] = torch.cat(resized, dim=1)  # (B, groups * keys, h, w)
        return read

    def _run(self, *args: Any, **kwargs: Any) -> dict[_Tap, Tensor]:
        """Run the UNet under hooks that store modules' inputs and outputs as they are, and do nothing else.

        Anything computed inside a hook would be missing when gradient checkpointing runs the module again.
        """
        raw = {}
        stop = self.stop_early and not (torch.is_grad_enabled() and self.unet.is_gradient_checkpointing)

        def hook_for(tap: _Tap):
            def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
                value = inputs if tap.is_input else output
                raw[tap] = value if isinstance(value, Tensor) else value[0]
                if stop and len(raw) == len(self.taps):
                    raise _Stop

            return hook

        handles = []
        try:
            for tap in self.taps:
                handles.append(self.unet.get_submodule(tap.path).register_forward_hook(hook_for(tap)))
            self.unet(*args, return_dict=False, **kwargs)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if missing := sorted({tap.path for tap in self.taps - raw.keys()}):
            raise RuntimeError(
                f'the UNet did not execute {", ".join(missing)}; compiled code and fused projections (undone by '
                'unfuse_qkv_projections()) hide modules from hooks'
            )
        return raw

    def _read(self, site: Site, raw: dict[_Tap, Tensor], size: tuple[int, int]) -> Tensor:
        value, *key = (raw[tap] for tap in _taps(site))
        if site.kind in ('input', 'spatial'):
            return value
        if site.kind == 'map':
            value = _attention_map(self.unet.get_submodule(site.path), value, *key)
        return value.transpose(1, 2).unflatten(2, site.size(*size))  # (B, h*w, C) -> (B, C, h, w)

    def _average(self, layers: Sequence[Site], raw: dict[_Tap, Tensor], size: tuple[int, int]) -> Tensor:
        return sum(self._read(site, raw, size) for site in layers) / len(layers)


def _taps(site: Site) -> tuple[_Tap, ...]:
    """What has to be stored to read a site."""
    if site.kind == 'map':
        return _Tap(f'{site.path}.to_q'), _Tap(f'{site.path}.to_k')
    return (_Tap(site.path, is_input=site.kind == 'input'),)


def _attention_layers(category: str, available: Iterable[Site], finest: float, coarsest: float) -> list[Site]:
    """The maps of one category, in order of execution, whose strides are within bounds."""
    if category not in ATTENTION_CATEGORIES:
        raise ValueError(f'unknown attention {category!r}; there are: {", ".join(ATTENTION_CATEGORIES)}')
    part, kind = category.split('_')
    maps = [site for site in available if site.name.startswith(f'{part}-') and site.name.endswith(f'-{kind}-map')]
    if layers := [site for site in maps if finest <= site.stride <= coarsest]:
        return layers
    raise ValueError(
        f'attention {category!r} is empty: this UNet has none there at strides of {finest} to {coarsest} pixels'
    )


def _by_stride(layers: Sequence[Site]) -> dict[int, list[Site]]:
    """Sites sorted by stride, strides and sites in the order in which they come."""
    found: dict[int, list[Site]] = {}
    for site in layers:
        found.setdefault(site.stride, []).append(site)
    return found


def _attention_map(attention: nn.Module, query: Tensor, key: Tensor) -> Tensor:
    """Attention probabilities, averaged over heads; one head at a time, since they are large.

    Args:
        attention: diffusers' module that the queries and keys are of.
        query: Shape (B, N, heads * d).
        key: Shape (B, keys, heads * d).

    Returns:
        A tensor with shape (B, N, keys), computed in float32 because single probabilities underflow in half precision.
    """
    heads = zip(query.float().chunk(attention.heads, dim=-1), key.float().chunk(attention.heads, dim=-1), strict=True)
    return (sum(attention.get_attention_scores(q, k) for q, k in heads) / attention.heads).to(query.dtype)

"""Learned mixing of activations over layers and timesteps, after Diffusion Hyperfeatures (DHF, arXiv 2305.14334)."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, Literal

import torch
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn

from diffseg.geometry import resize

from .levels import Size, check_order, finest, parse_sizes, split_levels, spread_timesteps


@dataclass(frozen=True)
class MixingWeights:
    """Mixing weights of the (timestep, layer) pairs of one level.

    Attributes:
        timesteps: T labels.
        layers: L labels.
        weights: shape (T, L), on the CPU; not negative, with sum 1. Zero for pairs that are not mixed.
    """

    timesteps: tuple[str, ...]
    layers: tuple[str, ...]
    weights: Tensor

    def __str__(self) -> str:
        """A text table, one line per layer and one column per timestep."""
        label, cell = max(map(len, self.layers)), max(6, *map(len, self.timesteps))
        rows = [(' ' * label, self.timesteps)]
        rows += [
            (f'{layer:{label}}', [f'{w:.4f}' for w in column])
            for layer, column in zip(self.layers, self.weights.T.tolist(), strict=True)
        ]
        return '\n'.join('  '.join([head, *(f'{text:>{cell}}' for text in cells)]) for head, cells in rows)


class ConvNorm(nn.Conv2d):
    """Convolution without bias, then group norm; size-preserving."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, num_groups: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        nn.init.kaiming_normal_(self.weight, mode='fan_out', nonlinearity='relu')
        self.norm = nn.GroupNorm(num_groups, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w)."""
        return self.norm(super().forward(x))


class Bottleneck(nn.Module):
    """ResNet bottleneck with group norm, as DHF projects each layer.

    The scale of the norm before the residual sum is initialised with one, not zero, so that the branch contributes from
    the first step.
    """

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        width = out_channels // 4
        self.conv1 = ConvNorm(in_channels, width, 1, num_groups)
        self.conv2 = ConvNorm(width, width, 3, num_groups)
        self.conv3 = ConvNorm(width, out_channels, 1, num_groups)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else ConvNorm(in_channels, out_channels, 1, num_groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w)."""
        y = self.conv2(self.conv1(x).relu()).relu()
        return (self.conv3(y) + self.shortcut(x)).relu()


class LevelAggregation(nn.Module):
    """One level: a bottleneck per layer, shared over timesteps, and the softmax-weighted sum of their outputs."""

    def __init__(
        self,
        channels: Sequence[int],
        timesteps: Sequence[int],
        kept: Sequence[Sequence[int]],
        out_channels: int,
        num_groups: int,
    ) -> None:
        super().__init__()
        self.timesteps = list(timesteps)
        self.kept = [list(steps) for steps in kept]
        self.bottleneck_layers = nn.ModuleList(nn.Sequential(Bottleneck(c, out_channels, num_groups)) for c in channels)
        mixed = [[step in steps for steps in kept] for step in range(max(timesteps))]
        self.register_buffer('mixed', torch.tensor(mixed), persistent=False)  # (T, L)
        # Indices are buffers, since copying them to the device would synchronise.
        indices = [index for index, is_mixed in enumerate(chain(*mixed)) if is_mixed]  # of `mixing_weights` in T*L
        self.register_buffer('mixed_indices', torch.tensor(indices), persistent=False)
        for layer, steps in enumerate(self.kept):
            self.register_buffer(f'kept{layer}', torch.tensor(steps), persistent=False)
        self.mixing_weights = nn.Parameter(torch.ones(len(indices)))  # index s*L + l, if all are mixed

    def weights(self) -> Tensor:
        """Softmax over all timesteps and layers together, shape (T, L)."""
        return self.spread(self.mixing_weights.softmax(0))

    def spread(self, values: Tensor) -> Tensor:
        """A value of each pair that is mixed, in the order of `mixing_weights`, as a table (T, L); zero elsewhere."""
        return values.new_zeros(self.mixed.numel()).scatter(0, self.mixed_indices, values).view(self.mixed.shape)

    def average_weights(self) -> Tensor:
        """Mixing weights (T, L), averaged over positions if they differ."""
        return self.weights()

    def project(self, maps: Sequence[Tensor], size: Size, resize_first: bool) -> Iterator[Tensor]:
        """Project layers one by one; arguments as those of `forward`.

        Yields:
            For each layer its mixed timesteps, projected, with shape (B, T, P, h, w).
        """
        for layer, (x, steps, kept) in enumerate(zip(maps, self.timesteps, self.kept, strict=True)):
            x = x.unflatten(1, (steps, -1))  # (B, T, C, h, w)
            if len(kept) < steps:
                x = x.index_select(1, self.get_buffer(f'kept{layer}'))
            x = x.flatten(0, 1)  # (B*T, C, h, w)
            if resize_first:
                x = resize(x, size)
            yield self.bottleneck_layers[layer](x).unflatten(0, (-1, len(kept)))

    def forward(self, maps: Sequence[Tensor], size: Size, resize_first: bool) -> Tensor:
        """Mix.

        Layers are processed one by one, and those of one size are summed before they are resized, which is equivalent
        since resizing is linear.

        Args:
            maps: L maps with shapes (B, T*C, h, w).
            size: height and width of the result.
            resize_first: resize the maps instead of the projections.

        Returns:
            Shape (B, out_channels, *size).
        """
        weights = self.weights()
        sums: dict[Size, Tensor | float] = defaultdict(float)  # size -> (B, P, h, w)
        for layer, y in enumerate(self.project(maps, size, resize_first)):
            w = weights[:, layer].index_select(0, self.get_buffer(f'kept{layer}')).to(y.dtype)
            sums[y.shape[-2:]] = sums[y.shape[-2:]] + torch.einsum('t,btphw->bphw', w, y)
        return sum(resize(y, size) for y in sums.values())


@MODELS.register_module()
class AggregationNeck(BaseModule):
    """Mix activations over layers and timesteps into one map per level, with learned weights.

    Each layer has a bottleneck, shared over timesteps, and each level one softmax over all its (timestep, layer) pairs.
    With one level, DHF's `num_groups` and `out_channels`, and `resize='before'`, this is DHF's aggregation network,
    whose published state dicts can be loaded.

    Args:
        levels: the channels C of every layer of every level, fine -> coarse, in the backbone's order of layers.
        timesteps: number of timesteps T of every map; or one number for each, nested as `levels`.
        out_channels: channels P of every level's map; DHF has 384.
        num_groups: groups of every group norm.
        output_sizes: for each level a side or (height, width) in cells; by default the finest map of the level. DHF
            has [64].
        resize: resize the maps of a level 'after' the bottlenecks, which then run at the size of each map (SD1.5's
            twelve residual layers at 512 pixels: a fifth of the operations), or 'before' them, as DHF does. Equivalent
            if all maps have one size.
        layer_names: names of the layers of every level, for `mixing_weights`.
        timestep_names: names of the timesteps, for `mixing_weights`.
        kept: for each layer, nested as `levels`, the indices of its timesteps that are mixed; by default all. Set by
            `tools/convert/prune.py`.
        enlarge: for each level a factor of its height and width, if it has no output size; by default 1. It keeps the
            size of a level whose finest layer was pruned.

    Raises:
        ValueError: `out_channels / 4` is not a multiple of `num_groups`, the number of names or factors is wrong, or
            `kept` has timesteps that a layer lacks.
    """

    level_class: ClassVar[type[LevelAggregation]] = LevelAggregation

    def __init__(
        self,
        levels: Sequence[Sequence[int]],
        timesteps: int | Sequence[Sequence[int]],
        out_channels: int,
        num_groups: int = 32,
        output_sizes: Sequence[int | Sequence[int]] | None = None,
        resize: Literal['after', 'before'] = 'after',
        layer_names: Sequence[Sequence[str]] | None = None,
        timestep_names: Sequence[str | int] | None = None,
        kept: Sequence[Sequence[Sequence[int]]] | None = None,
        enlarge: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if out_channels % (4 * num_groups):
            raise ValueError(
                f'out_channels={out_channels} is not a multiple of 4 * num_groups = {4 * num_groups}: the bottlenecks '
                f'are out_channels / 4 wide and are normalised in num_groups groups'
            )
        if resize not in ('after', 'before'):
            raise ValueError(f"resize={resize!r} is neither 'after' nor 'before'")
        self.channels = [list(level) for level in levels]
        self.timesteps = spread_timesteps(timesteps, self.channels)
        self.out_channels = out_channels
        self.output_sizes = parse_sizes(output_sizes, len(self.channels))
        self.enlarge = [1] * len(self.channels) if enlarge is None else list(enlarge)
        if len(self.enlarge) != len(self.channels):
            raise ValueError(f'enlarge={self.enlarge} must have a factor for each of {len(self.channels)} levels')
        self.resize_first = resize == 'before'
        most = max(max(numbers) for numbers in self.timesteps)
        if layer_names is None:
            layer_names = [[f'layer {i}' for i in range(len(level))] for level in self.channels]
        if timestep_names is None:
            timestep_names = [f'step {i}' for i in range(most)]
        if [len(names) for names in layer_names] != [len(level) for level in self.channels]:
            raise ValueError(f'layer_names={layer_names} must name every layer of levels={self.channels}')
        if len(timestep_names) != most:
            raise ValueError(f'timestep_names={timestep_names} must name {most} timesteps')
        self.layer_names = [tuple(names) for names in layer_names]
        self.timestep_names = tuple(map(str, timestep_names))
        if kept is None:
            kept = [[range(steps) for steps in numbers] for numbers in self.timesteps]
        _check_kept(kept, self.timesteps)
        self.levels = nn.ModuleList(
            self.level_class(level, steps, indices, out_channels, num_groups)
            for level, steps, indices in zip(self.channels, self.timesteps, kept, strict=True)
        )
        self.register_load_state_dict_pre_hook(_accept_single_level)

    def mixing_weights(self) -> list[MixingWeights]:
        """The table of mixing weights of each level, averaged over positions if they differ."""
        tables = [level.average_weights().detach().float().cpu() for level in self.levels]
        return [
            MixingWeights(self.timestep_names[: len(table)], names, table)
            for names, table in zip(self.layer_names, tables, strict=True)
        ]

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Mix.

        Args:
            inputs: L maps with shapes (B, T*C, h, w), timestep-major, level by level.

        Returns:
            One map per level with shape (B, out_channels, h', w'), fine -> coarse.

        Raises:
            ValueError: the inputs do not match `levels`, or the levels do not go from fine to coarse.
        """
        levels = split_levels(inputs, self.channels, self.timesteps)
        sizes = [
            size or tuple(factor * side for side in finest(maps))
            for size, maps, factor in zip(self.output_sizes, levels, self.enlarge, strict=True)
        ]
        check_order(sizes)
        return tuple(
            level(maps, size, self.resize_first) for level, maps, size in zip(self.levels, levels, sizes, strict=True)
        )


def _check_kept(kept: Sequence[Sequence[Sequence[int]]], timesteps: Sequence[Sequence[int]]) -> None:
    if [len(level) for level in kept] != [len(level) for level in timesteps]:
        raise ValueError(f'kept={kept} must name timesteps for every layer, nested like their numbers: {timesteps}')
    for indices, steps in zip(chain(*kept), chain(*timesteps), strict=True):
        if not indices or list(indices) != sorted(set(indices) & set(range(steps))):
            raise ValueError(
                f'kept has {list(indices)} for a layer of {steps} timesteps; give one or more of 0 to {steps - 1}, '
                f'ascending, and remove a layer of which none is kept'
            )


def _accept_single_level(module: AggregationNeck, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Rename the keys of DHF's aggregation network, which has one unnamed level, to those of this neck."""
    if len(module.levels) == 1 and f'{prefix}mixing_weights' in state_dict:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f'{prefix}levels.0.{key.removeprefix(prefix)}'] = state_dict.pop(key)

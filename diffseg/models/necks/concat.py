"""Grouping maps into levels without parameters."""

from collections.abc import Sequence
from itertools import islice
from operator import mul
from typing import get_args

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor

from diffseg.geometry import resize

from .levels import Order, Size, check_order, finest, parse_sizes, split_levels, spread_timesteps


@MODELS.register_module()
class ConcatNeck(BaseModule):
    """Resize the maps of each level to one size and concatenate their channels.

    Args:
        levels: the channels C of every layer of every level, in the backbone's order of layers.
        timesteps: number of timesteps T of every map; or one number for each, nested as `levels`.
        output_sizes: for each level a side or (height, width) in cells; by default the finest map of the level.
        order: of the levels. mmseg's heads expect 'fine-to-coarse'; the configs of GDF have the reverse order.
        normalize: L2-normalise maps in every cell, so that those of different networks have equal weight. True: each by
            itself. Or, for each level, how many consecutive maps are normalised together: `[[3, 1]]` are three maps of
            Stable Diffusion together, and one of DINOv2 (SD + DINO, arXiv 2305.15347).
        weights: what the normalised parts are multiplied by, nested as `normalize`; by default 1.

    Attributes:
        out_channels: channels of each level's map.

    Raises:
        ValueError: an unknown order, or `normalize` or `weights` of another nesting than `levels`.
    """

    def __init__(
        self,
        levels: Sequence[Sequence[int]],
        timesteps: int | Sequence[Sequence[int]] = 1,
        output_sizes: Sequence[int | Sequence[int]] | None = None,
        order: Order = 'fine-to-coarse',
        normalize: bool | Sequence[Sequence[int]] = False,
        weights: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self.levels = [list(level) for level in levels]
        if order not in get_args(Order):
            raise ValueError(f'order is {order!r}; it is {" or ".join(map(repr, get_args(Order)))}')
        self.timesteps = spread_timesteps(timesteps, self.levels)
        self.output_sizes = parse_sizes(output_sizes, len(self.levels))
        self.order = order
        self.normalize = bool(normalize)
        self.parts = [[1] * len(level) for level in self.levels] if isinstance(normalize, bool) else normalize
        if [sum(parts) for parts in self.parts] != [len(level) for level in self.levels]:
            raise ValueError(
                f'normalize={normalize} must be True, False, or for each level numbers of maps that add up to those of '
                f'levels={self.levels}'
            )
        self.weights = [[1.0] * len(parts) for parts in self.parts] if weights is None else weights
        if weights is not None and not self.normalize:
            raise ValueError(f'weights={weights} are those of normalised maps; set normalize')
        if [len(each) for each in self.weights] != [len(parts) for parts in self.parts]:
            raise ValueError(f'weights={weights} must have a number for every part of normalize={normalize}')
        self.out_channels = [sum(map(mul, *pair)) for pair in zip(self.timesteps, self.levels, strict=True)]

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Concatenate.

        Args:
            inputs: L maps with shapes (B, T*C, h, w), level by level.

        Returns:
            One map per level with shape (B, sum of T*C, h', w').

        Raises:
            ValueError: the inputs do not match `levels`, or the levels are not in `order`.
        """
        levels = split_levels(inputs, self.levels, self.timesteps)
        sizes = [size or finest(maps) for size, maps in zip(self.output_sizes, levels, strict=True)]
        check_order(sizes, self.order)
        return tuple(map(self._join, levels, sizes, self.parts, self.weights))

    def _join(self, maps: Sequence[Tensor], size: Size, parts: Sequence[int], weights: Sequence[float]) -> Tensor:
        """Resize and concatenate the maps (B, C, h, w) of a level, its parts normalised and weighted."""
        remaining = (resize(x, size) for x in maps)
        joined = [torch.cat(list(islice(remaining, count)), dim=1) for count in parts]
        if self.normalize:
            joined = [weight * F.normalize(x, dim=1) for x, weight in zip(joined, weights, strict=True)]
        return torch.cat(joined, dim=1)

"""Grouping maps into levels without parameters."""

from collections.abc import Sequence
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
        normalize: L2-normalise each map in every cell before maps are concatenated, so that those of different networks
            have equal weight (Stable Diffusion with DINOv2, arXiv 2305.15347).

    Attributes:
        out_channels: channels of each level's map.

    Raises:
        ValueError: an unknown order.
    """

    def __init__(
        self,
        levels: Sequence[Sequence[int]],
        timesteps: int | Sequence[Sequence[int]] = 1,
        output_sizes: Sequence[int | Sequence[int]] | None = None,
        order: Order = 'fine-to-coarse',
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.levels = [list(level) for level in levels]
        if order not in get_args(Order):
            raise ValueError(f'order is {order!r}; it is {" or ".join(map(repr, get_args(Order)))}')
        self.timesteps = spread_timesteps(timesteps, self.levels)
        self.output_sizes = parse_sizes(output_sizes, len(self.levels))
        self.order = order
        self.normalize = normalize
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
        return tuple(
            torch.cat([self._fit(x, size) for x in maps], dim=1) for maps, size in zip(levels, sizes, strict=True)
        )

    def _fit(self, x: Tensor, size: Size) -> Tensor:
        x = resize(x, size)
        return F.normalize(x, dim=1) if self.normalize else x

"""Grouping maps into levels without parameters."""

from collections.abc import Sequence
from typing import get_args

import torch
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor

from .levels import Order, check_order, finest, parse_sizes, resize, split_levels


@MODELS.register_module()
class ConcatNeck(BaseModule):
    """Resize the maps of each level to one size and concatenate their channels.

    Args:
        levels: the channels C of every layer of every level, in the backbone's order of layers.
        timesteps: how many timesteps T every map holds.
        output_sizes: for each level a side or (height, width) in cells; by default the finest map of the level.
        order: how the levels go. What mmseg's heads expect is 'fine-to-coarse'; the configs of GDF have it the other
            way round.
        in_index: for each level the positions of its maps among the inputs, where the backbone does not return them
            level by level (attention maps, for instance, come last).

    Attributes:
        out_channels: channels of each level's map.

    Raises:
        ValueError: an unknown order, or `in_index` does not match `levels`.
    """

    def __init__(
        self,
        levels: Sequence[Sequence[int]],
        timesteps: int = 1,
        output_sizes: Sequence[int | Sequence[int]] | None = None,
        order: Order = 'fine-to-coarse',
        in_index: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.levels = [list(level) for level in levels]
        if order not in get_args(Order):
            raise ValueError(f'order is {order!r}; it is {" or ".join(map(repr, get_args(Order)))}')
        if in_index is not None and [len(level) for level in in_index] != [len(level) for level in self.levels]:
            raise ValueError(f'in_index={in_index} must have one position for every layer of levels={self.levels}')
        self.timesteps = timesteps
        self.output_sizes = parse_sizes(output_sizes, len(self.levels))
        self.order = order
        self.in_index = None if in_index is None else [i for level in in_index for i in level]
        self.out_channels = [timesteps * sum(level) for level in self.levels]

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Concatenate.

        Args:
            inputs: L maps with shapes (B, T*C, h, w), level by level unless `in_index` says otherwise.

        Returns:
            One map per level with shape (B, sum of T*C, h', w').

        Raises:
            ValueError: the inputs do not match `levels` or `in_index`, or the levels do not go as `order` says.
        """
        if self.in_index is not None:
            if sorted(self.in_index) != list(range(len(inputs))):
                raise ValueError(f'in_index names the maps {self.in_index}, but the neck got {len(inputs)}')
            inputs = [inputs[i] for i in self.in_index]
        levels = split_levels(inputs, self.levels, self.timesteps)
        sizes = [size or finest(maps) for size, maps in zip(self.output_sizes, levels, strict=True)]
        check_order(sizes, self.order)
        return tuple(
            torch.cat([resize(x, size) for x in maps], dim=1) for maps, size in zip(levels, sizes, strict=True)
        )

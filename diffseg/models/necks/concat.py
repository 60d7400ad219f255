"""Grouping maps into levels without parameters."""

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor

from .levels import check_fine_to_coarse, finest, parse_sizes, resize, split_levels


@MODELS.register_module()
class ConcatNeck(BaseModule):
    """Resize the maps of each level to one size and concatenate their channels.

    Args:
        levels: the channels C of every layer of every level, fine -> coarse, in the backbone's order of layers.
        timesteps: how many timesteps T every map holds.
        output_sizes: for each level a side or (height, width) in cells; by default the finest map of the level.

    Attributes:
        out_channels: channels of each level's map.
    """

    def __init__(
        self,
        levels: Sequence[Sequence[int]],
        timesteps: int = 1,
        output_sizes: Sequence[int | Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.levels = [list(level) for level in levels]
        self.timesteps = timesteps
        self.output_sizes = parse_sizes(output_sizes, len(self.levels))
        self.out_channels = [timesteps * sum(level) for level in self.levels]

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Concatenate.

        Args:
            inputs: L maps with shapes (B, T*C, h, w), level by level.

        Returns:
            One map per level with shape (B, sum of T*C, h', w'), fine -> coarse.

        Raises:
            ValueError: the inputs do not match `levels`, or the levels do not go from fine to coarse.
        """
        levels = split_levels(inputs, self.levels, self.timesteps)
        sizes = [size or finest(maps) for size, maps in zip(self.output_sizes, levels, strict=True)]
        check_fine_to_coarse(sizes)
        return tuple(
            torch.cat([resize(x, size) for x in maps], dim=1) for maps, size in zip(levels, sizes, strict=True)
        )

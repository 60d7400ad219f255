"""Grouping of the backbone's maps into levels, and the order of levels, for all necks."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor

from diffseg.geometry import Size

Order = Literal['fine-to-coarse', 'coarse-to-fine']


def parse_sizes(output_sizes: Sequence[int | Sequence[int]] | None, num_levels: int) -> list[Size | None]:
    """One `(height, width)` or None (the finest map of the level) per level.

    Args:
        output_sizes: a side or `(height, width)` for each level, in cells.
        num_levels: number of levels.

    Raises:
        ValueError: the numbers of sizes and levels differ.
    """
    if output_sizes is None:
        return [None] * num_levels
    if len(output_sizes) != num_levels:
        raise ValueError(
            f'output_sizes has {len(output_sizes)} entries for {num_levels} levels; give one size per level'
        )
    return [(size, size) if isinstance(size, int) else (size[0], size[1]) for size in output_sizes]


def spread_timesteps(timesteps: int | Sequence[Sequence[int]], levels: Sequence[Sequence[int]]) -> list[list[int]]:
    """The number of timesteps T of every map of every level.

    Args:
        timesteps: one number for all maps, or one for each, nested as `levels`.
        levels: one item for every map of every level.

    Raises:
        ValueError: the numbers have another nesting.
    """
    if isinstance(timesteps, int):
        return [[timesteps] * len(level) for level in levels]
    if [len(numbers) for numbers in timesteps] != [len(level) for level in levels]:
        raise ValueError(f'timesteps={timesteps} must be one number, or one for every layer of levels={levels}')
    return [list(numbers) for numbers in timesteps]


def split_levels(
    maps: Sequence[Tensor], levels: Sequence[Sequence[int]], timesteps: Sequence[Sequence[int]]
) -> list[list[Tensor]]:
    """Sort maps into levels and verify their channels.

    Args:
        maps: L maps with shapes (B, T*C, h, w), level by level.
        levels: the channels C of every map of every level.
        timesteps: T of every map of every level.

    Raises:
        ValueError: the number of maps or the channels of one do not match `levels`.
    """
    expected = [pair for level in zip(timesteps, levels, strict=True) for pair in zip(*level, strict=True)]
    if len(maps) != len(expected):
        raise ValueError(f'the neck got {len(maps)} maps, but its levels {levels} name {len(expected)}')
    for i, (x, (steps, channels)) in enumerate(zip(maps, expected, strict=True)):
        if x.shape[1] != steps * channels:
            raise ValueError(
                f'map {i} has {x.shape[1]} channels, but levels and timesteps say {steps} * {channels} = '
                f'{steps * channels}; levels={levels} must list the channels of the layers in the order in which '
                f'the backbone returns them'
            )
    remaining = iter(maps)
    return [[next(remaining) for _ in level] for level in levels]


def finest(maps: Sequence[Tensor]) -> Size:
    """The largest height and width (h, w) among maps with shapes (B, C, h, w)."""
    return max(x.shape[-2] for x in maps), max(x.shape[-1] for x in maps)


def check_order(sizes: Sequence[Size], order: Order = 'fine-to-coarse') -> None:
    """Verify the order of levels.

    mmseg's heads expect them fine -> coarse (UPerHead pools `inputs[-1]` and predicts at the size of `inputs[0]`).
    Unlike GDF, whose configs list levels coarse -> fine and so predict at the coarsest size; `order` allows this.

    Raises:
        ValueError: a level is finer (or coarser) than the one before it.
    """
    for before, after in pairwise(sizes if order == 'fine-to-coarse' else reversed(sizes)):
        if after[0] > before[0] or after[1] > before[1]:
            raise ValueError(
                f'levels must go from {order.replace("-", " ")}, but their sizes (height, width) are {list(sizes)}; '
                f'reorder the levels of the neck and the layers of the backbone'
            )

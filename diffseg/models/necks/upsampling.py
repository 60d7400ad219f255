"""Upsampling of aggregated maps, guided by the image."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from .aggregation import AggregationNeck

WINDOW = 3  # cells around a position that it may take values from, along each axis
GUIDE_CHANNELS = 32


class GuidedUpsampling(nn.Module):
    """Neighbourhood attention from fine cells, which see the image, to the coarse cells around them, which have values.

    As in joint bilateral upsampling (doi 10.1145/1276377.1276497) weights fall with the distance in space and with that
    of features, which here are learned from the image, as in JAFAR (arXiv 2506.11136) and NAF (arXiv 2511.18452):
    queries q are an encoding of the colour of each fine cell, keys k the mean of the queries in each coarse cell, and
    the weight of a coarse cell at a distance d, in coarse cells, is

        softmax(-exp(s) |q - k|^2 / C - exp(r) d^2)

    over a window of 3 x 3 cells inside the map. Every value is a convex combination of those in its window: a constant
    map stays constant, and no coarse cell takes values from far away. Nothing depends on direction, so that a mirrored
    image and map give the mirrored result.

    Args:
        factor: fine cells per coarse cell along each axis.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.encoder = nn.Sequential(
            nn.Conv2d(3, GUIDE_CHANNELS, 1), nn.ReLU(), nn.Conv2d(GUIDE_CHANNELS, GUIDE_CHANNELS, 1)
        )
        for conv in (self.encoder[0], self.encoder[2]):  # keep the scale of differences between colours
            nn.init.kaiming_normal_(conv.weight, nonlinearity='relu')
            nn.init.zeros_(conv.bias)
        self.feature_scale = nn.Parameter(torch.tensor(8.0).log())
        self.distance_scale = nn.Parameter(torch.tensor(2.0).log())  # a Gaussian of half a cell
        self.register_buffer('distances', _squared_distances(factor), persistent=False)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """Upsample.

        Args:
            x: with shape (B, P, h, w).
            image: with shape (B, 3, H, W), in [-1, 1]; the cells of the map tile it.

        Returns:
            Shape (B, P, factor*h, factor*w).
        """
        size = tuple(self.factor * side for side in x.shape[-2:])
        queries = self.encoder(F.interpolate(image, size, mode='area'))  # (B, C, factor*h, factor*w)
        keys = _windows(F.avg_pool2d(queries, self.factor))  # (B, C, 9, h, w)
        queries = queries.unflatten(3, (-1, self.factor)).unflatten(2, (-1, self.factor))  # (B, C, h, i, w, j)
        # |q - k|^2 without |q|^2, which the softmax does not see
        dots = torch.einsum('bchiwj,bcnhw->bnhiwj', queries, keys)
        differences = (keys.square().sum(1)[:, :, :, None, :, None] - 2 * dots) / GUIDE_CHANNELS
        logits = -self.feature_scale.exp() * differences - self.distance_scale.exp() * self.distances
        inside = _windows(x.new_ones(1, 1, *x.shape[-2:]))[0].bool()  # (1, 9, h, w)
        weights = logits.masked_fill(~inside[:, :, :, None, :, None], -torch.inf).softmax(1).to(x.dtype)
        return torch.einsum('bnhiwj,bpnhw->bphiwj', weights, _windows(x)).flatten(4).flatten(2, 3)


def _windows(x: Tensor) -> Tensor:
    """The window around every cell, zero outside: (B, C, h, w) -> (B, C, 9, h, w)."""
    height, width = x.shape[-2:]
    return F.unfold(x, WINDOW, padding=WINDOW // 2).view(*x.shape[:2], WINDOW**2, height, width)


def _squared_distances(factor: int) -> Tensor:
    """From each fine cell to the centres of the window's cells, in coarse cells: (9, 1, factor, 1, factor)."""
    fine = (torch.arange(factor) + 0.5) / factor - 0.5
    squares = (torch.arange(WINDOW)[:, None] - WINDOW // 2 - fine).square()  # (3, factor)
    return (squares[:, None, :, None] + squares[None, :, None, :]).view(WINDOW**2, 1, factor, 1, factor)


@MODELS.register_module()
class UpsamplingNeck(AggregationNeck):
    """`AggregationNeck` whose levels are then upsampled, guided by the image, see `GuidedUpsampling`.

    The backbone passes the image after its maps: `DiffusionBackbone(output_image=True)`.

    Args:
        *args: see `AggregationNeck`.
        factor: of the height and width of every level.
        **kwargs: see `AggregationNeck`.

    Raises:
        ValueError: a factor below 2, and as `AggregationNeck` does.
    """

    def __init__(self, *args: Any, factor: int = 2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if factor < 2:
            raise ValueError(f'factor={factor} does not upsample; give 2 or more, or use AggregationNeck')
        self.upsampling = nn.ModuleList(GuidedUpsampling(factor) for _ in self.levels)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Mix and upsample.

        Args:
            inputs: L maps as `AggregationNeck` takes them, and the image with shape (B, 3, H, W).

        Returns:
            One map per level with shape (B, out_channels, factor*h', factor*w'), fine -> coarse.

        Raises:
            ValueError: as `AggregationNeck` does, or the image is missing.
        """
        *maps, image = inputs
        if len(maps) != sum(map(len, self.channels)) or image.shape[1] != 3:
            raise ValueError(
                f'UpsamplingNeck got {len(inputs)} maps, the last with {inputs[-1].shape[1]} channels, but takes '
                f'{sum(map(len, self.channels))} and the image; set output_image=True in the backbone'
            )
        levels = super().forward(maps)
        return tuple(upsample(x, image) for upsample, x in zip(self.upsampling, levels, strict=True))

"""Heads from maps to descriptors, with the loss for corresponding points."""

import math

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn

from diffseg.geometry import pixels_to_cells


def points_to_cells(points: Tensor, size: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Indices of the cells, row by row, that points are assigned to in training.

    As in DHF and GDF, coordinates are scaled by the convention 'corners' (see `pixels_to_cells`), clamped to the map
    and rounded (half to even).

    Args:
        points: (x, y) with shape (N, 2), in pixels.
        size: height and width of the image in pixels.
        cells: height and width of the map.

    Returns:
        Shape (N,), int64.
    """
    x, y = pixels_to_cells(points, size, cells, 'corners').unbind(dim=1)
    return y.clamp(0, cells[0] - 1).round().long() * cells[1] + x.clamp(0, cells[1] - 1).round().long()


def symmetric_cross_entropy(
    source: Tensor, target: Tensor, source_cells: Tensor, target_cells: Tensor, scale: Tensor | float
) -> Tensor:
    """Cross-entropy of each point's similarity with all cells of the other map, both ways, halved.

    DHF (arXiv 2305.14334), section 3.3; GDF has the same. Only the rows of the similarity matrix that belong to points
    are computed.

    Args:
        source: descriptors with shape (C, h, w).
        target: descriptors with shape (C, h', w').
        source_cells: indices of cells with shape (N,).
        target_cells: corresponding indices with shape (N,).
        scale: of the cosine similarities.
    """
    a, b = (F.normalize(x.flatten(1).T, dim=1) for x in (source, target))  # (h*w, C)
    forward = F.cross_entropy(scale * a[source_cells] @ b.T, target_cells)
    backward = F.cross_entropy(scale * b[target_cells] @ a.T, source_cells)
    return (forward + backward) / 2


@MODELS.register_module()
class DescriptorHead(BaseModule):
    """Identity: the map is the descriptor, as for zero-shot matching and after DHF's aggregation network.

    Args:
        logit_scale: factor of cosine similarities in the loss.
        learn_logit_scale: train it (its logarithm, as CLIP does). Otherwise it is a constant, as in DHF and GDF, and
            not saved in checkpoints.

    Attributes:
        logit_scale: natural logarithm of the factor.
    """

    logit_scale: Tensor

    def __init__(self, logit_scale: float = 1 / 0.07, learn_logit_scale: bool = False) -> None:
        super().__init__()
        scale = torch.tensor(math.log(logit_scale))
        if learn_logit_scale:
            self.logit_scale = nn.Parameter(scale)
        else:
            self.register_buffer('logit_scale', scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h, w)."""
        return x

    def loss(self, source: Tensor, target: Tensor, source_cells: Tensor, target_cells: Tensor) -> Tensor:
        """`symmetric_cross_entropy` of one pair."""
        return symmetric_cross_entropy(source, target, source_cells, target_cells, self.logit_scale.exp())


@MODELS.register_module()
class ConvDescriptorHead(DescriptorHead):
    """One 3 x 3 convolution without bias, as GDF trains for correspondence (arXiv 2410.03558).

    Args:
        in_channels: of the map.
        out_channels: of the descriptor; by default the same. GDF halves them if several models are joined.
        **kwargs: see `DescriptorHead`.
    """

    def __init__(self, in_channels: int, out_channels: int | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.conv = nn.Conv2d(in_channels, out_channels or in_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w)."""
        return self.conv(x)

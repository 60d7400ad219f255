"""Percentage of correct keypoints (PCK)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def correct_keypoints(predicted: Tensor, target: Tensor, extent: float, alpha: float = 0.1) -> Tensor:
    """Which predictions are at most `alpha * extent` away from the truth.

    Args:
        predicted: (x, y) in pixels, with shape (N, 2).
        target: (x, y) in pixels, with shape (N, 2).
        extent: in pixels; the longer side of the target's box for PCK-bbox, of the target image for PCK-img.
        alpha: fraction of `extent` that is tolerated.

    Returns:
        bool with shape (N,).

    Raises:
        ValueError: when the shapes differ or `extent` is not positive.
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f'predicted has shape {tuple(predicted.shape)} and target {tuple(target.shape)}; both must be (N, 2)'
        )
    if extent <= 0:
        raise ValueError(f'extent is {extent}; the box or image of the target must have a positive size in pixels')
    return torch.linalg.vector_norm(predicted.double() - target.double(), dim=-1) <= alpha * extent


def pck(correct: Sequence[Tensor], mean: Literal['image', 'point']) -> float:
    """PCK in percent over pairs.

    Args:
        correct: for every pair which of its keypoints are correct, bool with shape (N_pair,).
        mean: 'image' averages the pairs' own percentages, as DIFT's 52.9 on SPair-71k does; 'point' counts all
            keypoints alike, as later papers do.

    Raises:
        ValueError: without any keypoint, or on another `mean`.
    """
    pairs = [each.double() for each in correct if len(each)]
    if not pairs:
        raise ValueError('there is no keypoint to score')
    if mean == 'image':
        return 100 * float(torch.stack([each.mean() for each in pairs]).mean())
    if mean == 'point':
        return 100 * float(torch.cat(pairs).mean())
    raise ValueError(f"mean is {mean!r}, choose 'image' or 'point'")

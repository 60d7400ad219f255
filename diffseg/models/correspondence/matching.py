"""Nearest neighbours between the descriptors of two images."""

import torch
import torch.nn.functional as F
from torch import Tensor


def match_points(
    source: Tensor, target: Tensor, points: Tensor, source_size: tuple[int, int], target_size: tuple[int, int]
) -> Tensor:
    """Find in the target image what lies at given points of the source image.

    Both maps are upsampled to the size of their image (bilinear), the source's descriptor is read at every point, and
    the target pixel of highest cosine similarity is its match (DIFT, arXiv 2306.03881, evaluation on SPair-71k).

    Args:
        source: descriptors with shape (C, h, w).
        target: descriptors with shape (C, h', w').
        points: (x, y) in whole pixels of the source image, with shape (N, 2).
        source_size: height and width of the source image in pixels.
        target_size: height and width of the target image in pixels.

    Returns:
        (x, y) in pixels of the target image, with shape (N, 2), int64.

    Raises:
        ValueError: when a point lies outside the source image, or the maps differ in channels.
    """
    if source.shape[0] != target.shape[0]:
        raise ValueError(
            f'source has {source.shape[0]} channels and target {target.shape[0]}; they must be of the same kind'
        )
    x, y = points.long().to(source.device).unbind(dim=-1)
    height, width = source_size
    if ((x < 0) | (y < 0) | (x >= width) | (y >= height)).any():
        raise ValueError(
            f'points {points.tolist()} are not all inside the source image of {width} x {height} pixels (x, y)'
        )
    upsampled = F.interpolate(source[None], source_size, mode='bilinear')[0]
    descriptors = F.normalize(upsampled[:, y, x], dim=0)  # (C, N)
    candidates = F.normalize(
        F.interpolate(target[None], target_size, mode='bilinear')[0].flatten(1), dim=0
    )  # (C, H' W')
    best = (descriptors.T @ candidates).argmax(dim=1)
    return torch.stack([best % target_size[1], best // target_size[1]], dim=1)

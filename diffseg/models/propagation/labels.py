"""Encode annotations as labels of cells, and decode propagated labels to predictions."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffseg.geometry import Size, cells_to_pixels, pixels_to_cells, resize

VOID = 255
SIGMA = 0.5  # of a joint's Gaussian, in cells
PEAK = 3  # number of highest cells whose mean position is the joint


def encode_mask(mask: Tensor, cells: Size) -> Tensor:
    """One-hot labels of cells, each the object at its centre (Pillow's NEAREST).

    Unlike DIFT, void pixels are background; there they are one more object, which is then predicted.

    Args:
        mask: object ids with shape (H, W), uint8: 0 background, 255 void.
        cells: height and width of the map.

    Returns:
        Shape (K, h, w) for background and objects 1 to K - 1, float32. An object without a cell centre has zeros only,
        and is never predicted.
    """
    objects = mask.where(mask != VOID, 0)
    nearest = _nearest(objects, cells).long()
    return F.one_hot(nearest, int(objects.max()) + 1).permute(2, 0, 1).float()


def decode_mask(soft: Tensor, frame_size: Size, size: Size) -> Tensor:
    """Object ids from soft labels: upsampled bilinearly, each label stretched to [0, 1], then argmax.

    Args:
        soft: with shape (K, h, w), not negative.
        frame_size: of the model's input frame.
        size: of the mask, which is resized to it (Pillow's NEAREST).

    Returns:
        Shape (H, W), uint8, on the CPU.
    """
    upsampled = resize(soft[None], frame_size)[0]  # (K, H', W')
    return _nearest(stretch(upsampled).argmax(0).to(torch.uint8), size)


def stretch(labels: Tensor) -> Tensor:
    """Map the lowest value of each label to 0 and the highest to 1.

    Unlike DIFT, a label whose values are all equal is unchanged; in DIFT these become 0 / 0, unless they are 0.

    Args:
        labels: with shape (K, h, w).
    """
    lowest, highest = labels.amin((1, 2), keepdim=True), labels.amax((1, 2), keepdim=True)
    return torch.where(highest > lowest, (labels - lowest) / (highest - lowest), labels)


def encode_joints(joints: Tensor, size: Size, cells: Size) -> Tensor:
    """A Gaussian on the map for each joint, 1 in the nearest cell, as in Contrastive Random Walk.

    The Gaussian is truncated two cells before and one cell after its centre along each axis. It is empty for joints
    that are far outside. Unlike Contrastive Random Walk, joints near the upper and left borders are rounded like all
    others, and there is no label for the background, on which no joint depends.

    Args:
        joints: (x, y) with shape (J, 2), in pixels.
        size: of the image in pixels.
        cells: height and width of the map.

    Returns:
        Shape (J, h, w), float32.
    """
    middles = (pixels_to_cells(joints.cpu(), size, cells, 'corners') + 0.5).floor()  # (J, 2)
    x, y = (
        torch.arange(count, dtype=torch.float64) - middle[:, None]
        for count, middle in zip(cells[::-1], middles.T, strict=True)
    )  # distances (J, w), (J, h)
    columns, rows = (torch.exp(-(d**2) / (2 * SIGMA**2)) * ((d >= -2) & (d <= 1)) for d in (x, y))
    return (rows[:, :, None] * columns[:, None]).float()


def decode_joints(soft: Tensor, size: Size) -> Tensor:
    """Joints from soft labels: the mean position of the three highest cells, weighted by their values.

    Args:
        soft: with shape (J, h, w), not negative.
        size: of the image in pixels.

    Returns:
        (x, y) with shape (J, 2), float32, in pixels; (-1, -1) where a joint's label is zero everywhere.
    """
    h, w = soft.shape[1:]
    values, indices = soft.flatten(1).double().topk(min(PEAK, h * w))  # (J, 3)
    weights = values / values.sum(1, keepdim=True)
    means = torch.stack([(weights * (indices % w)).sum(1), (weights * (indices // w)).sum(1)], dim=1)
    points = cells_to_pixels(means, size, (h, w), 'corners')
    return points.where(values[:, :1] > 0, -1).float()


def _nearest(mask: Tensor, size: Size) -> Tensor:
    """Resize (H, W), uint8; on the CPU."""
    return torch.from_numpy(np.array(Image.fromarray(mask.cpu().numpy()).resize(size[::-1], Image.Resampling.NEAREST)))

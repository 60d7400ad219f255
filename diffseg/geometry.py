"""Where the cells of a map lie in its image: the only module that turns pixels into cells, and cells into pixels.

Cells tile the image. A map of h x w cells of an image of H x W pixels covers exactly these pixels, so that a cell is
H / h pixels high and W / w pixels wide. Coordinates are (x, y), and whole numbers are the centres of pixels and of
cells. So pixel x and cell i have the same centre where

    (x + 1/2) / W = (i + 1/2) / w,

as in `torch.nn.functional.interpolate` with `align_corners=False`. Between the centres of cells values are interpolated
bilinearly; from the centres of the outermost cells to the border of the image they are constant.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from diffseg.devices import upload

Size = tuple[int, int]  # height, width
Convention = Literal['centres', 'corners', 'published']


def map_size(size: Size, stride: int) -> Size:
    """Height and width, in cells, of the map of stride `stride` of an image of `size` pixels: rounded up."""
    return -(-size[0] // stride), -(-size[1] // stride)


def pixels_to_cells(points: Tensor, size: Size, cells: Size, convention: Convention = 'centres') -> Tensor:
    """Coordinates of points on a map.

    Args:
        points: (x, y) in pixels with shape (..., 2), which may lie between pixels, and outside.
        size: height H and width W of the image in pixels.
        cells: height h and width w of the map.
        convention: 'centres', as this module has it: (x + 1/2) w / W - 1/2. Two others are for what has been published
            with them: 'corners', x w / W, half a cell minus half a pixel more (training of DHF and GDF, joints of
            Contrastive Random Walk); and 'published', x w / (W - 1) - 1/2, which takes the first and the last pixel for
            the ends of the map (DIFT on HPatches).

    Returns:
        (x, y) in cells with shape (..., 2), float64 where the device has it.

    Raises:
        ValueError: another convention.
    """
    check_convention(convention)
    points = points.to(precision(points.device))
    pixels, counts = points.new_tensor(size[::-1]), points.new_tensor(cells[::-1])
    if convention == 'corners':
        return points * (counts / pixels)
    if convention == 'published':
        return points * (counts / (pixels - 1)) - 0.5
    return (points + 0.5) * (counts / pixels) - 0.5


def cells_to_pixels(points: Tensor, size: Size, cells: Size, convention: Convention = 'centres') -> Tensor:
    """The inverse of `pixels_to_cells`: (x, y) in cells to (x, y) in pixels, each with shape (..., 2)."""
    check_convention(convention)
    points = points.to(precision(points.device))
    pixels, counts = points.new_tensor(size[::-1]), points.new_tensor(cells[::-1])
    if convention == 'corners':
        return points * (pixels / counts)
    if convention == 'published':
        return (points + 0.5) * ((pixels - 1) / counts)
    return (points + 0.5) * (pixels / counts) - 0.5


def pixel_neighbours(cells: int, pixels: int, device: torch.device | str | None = None) -> tuple[Tensor, ...]:
    """Along one axis, the two cells between whose centres the centre of each pixel lies.

    Args:
        cells: of the map along this axis.
        pixels: of the image along this axis.
        device: of the result.

    Returns:
        The cell before and the cell after, int64, and the fraction of the way from one to the other, float64 where the
        device has it, each with shape (pixels,). Both cells are the same at the end of the map.
    """
    dtype = precision(torch.device('cpu' if device is None else device))
    centres = (torch.arange(pixels, dtype=dtype, device=device) + 0.5) * (cells / pixels) - 0.5
    return _neighbours(centres, cells)


def sample_points(
    maps: Tensor,
    points: Tensor,
    size: Size,
    convention: Convention = 'centres',
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Interpolate a map bilinearly at points of its image.

    At whole pixels this is the map that `resize` brings to the size of the image.

    Args:
        maps: with shape (C, h, w).
        points: (x, y) in pixels with shape (N, 2); they need not be whole. Those outside have the value at the border.
        size: height H and width W of the image in pixels.
        convention: of coordinates, see `pixels_to_cells`. With 'published', a map is zero outside of its cells, as
            `grid_sample` pads it by default.
        dtype: of the result and of the interpolation; by default that of the maps, whose lower precisions than float32
            are interpolated in this.

    Returns:
        Shape (N, C).

    Raises:
        ValueError: another convention.
    """
    sizes = maps.shape[2], maps.shape[1]
    coordinates = pixels_to_cells(points.to(maps.device), size, maps.shape[1:], convention).unbind(-1)
    out_dtype, dtype = dtype or maps.dtype, dtype or torch.promote_types(maps.dtype, torch.float32)
    if convention == 'published':
        return _sample_zero_padded(maps, coordinates, dtype).to(out_dtype)
    (left, right, across), (top, bottom, down) = map(_neighbours, coordinates, sizes)
    corners = [maps[:, y, x].to(dtype) for y in (top, bottom) for x in (left, right)]  # (C, N) each
    upper, lower = (torch.lerp(*pair, across.to(dtype)) for pair in (corners[:2], corners[2:]))
    return torch.lerp(upper, lower, down.to(dtype)).T.to(out_dtype)


def resize(maps: Tensor, size: Size) -> Tensor:
    """Resize maps, or images, (B, C, h, w) to `size`, height and width: bilinearly, the extent of cells kept."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode='bilinear', align_corners=False)


def fit_to_image(maps: Tensor, stride: int, size: Size) -> Tensor:
    """Bring a map of an image that was continued to the right and below to cells that tile the image itself.

    The cells that a network gives are `stride` pixels apart, from the upper left corner of the image on. Where a side
    of the image is no multiple of that, the last of them reaches beyond the border. Here the map is interpolated
    linearly at the centres of cells that do not. What is computed from the continuation takes part where the last
    centres lie behind the last cell that is inside; the first centres lie before that of the first cell, where the line
    through the first two cells goes on, so that linear functions stay what they are. Along sides that are multiples of
    the stride nothing is computed, and cells beyond the image are cut off.

    Args:
        maps: with shape (..., h', w'), h' * stride >= H and w' * stride >= W.
        stride: pixels per cell.
        size: height H and width W of the image in pixels, without its continuation.

    Returns:
        Shape (..., h, w) with h = ceil(H / stride) and w = ceil(W / stride).

    Raises:
        ValueError: the map does not cover the image.
    """
    cells = map_size(size, stride)
    if any(available < needed for available, needed in zip(maps.shape[-2:], cells, strict=True)):
        raise ValueError(
            f'a map of {maps.shape[-2]} x {maps.shape[-1]} cells of {stride} pixels does not cover an image of '
            f'{size[0]} x {size[1]} pixels; it takes {cells[0]} x {cells[1]} cells'
        )
    for dim, pixels, count in zip((-2, -1), size, cells, strict=True):
        maps = _fit_axis(maps, dim, stride, pixels, count)
    return maps


def check_convention(convention: str) -> None:
    """Raise a ValueError for an unknown convention of coordinates."""
    if convention not in get_args(Convention):
        raise ValueError(f'convention is {convention!r}; it is {" or ".join(map(repr, get_args(Convention)))}')


def precision(device: torch.device) -> torch.dtype:
    """Double precision, where the device has it."""
    return torch.float32 if device.type == 'mps' else torch.float64


def _neighbours(coordinates: Tensor, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `pixel_neighbours` gives, for any coordinates in cells; constant beyond the outermost centres."""
    coordinates = coordinates.clamp(0, cells - 1)
    before = coordinates.long()
    return before, (before + 1).clamp(max=cells - 1), coordinates - before


def _sample_zero_padded(maps: Tensor, coordinates: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Interpolate (C, h, w) at x and y in cells, zero outside: shape (N, C)."""
    x, y = coordinates
    total = maps.new_zeros(len(x), maps.shape[0], dtype=dtype)
    for column in (x.floor(), x.floor() + 1):
        for row in (y.floor(), y.floor() + 1):
            inside = (column >= 0) & (column < maps.shape[2]) & (row >= 0) & (row < maps.shape[1])
            weight = torch.where(inside, (1 - (x - column).abs()) * (1 - (y - row).abs()), 0)
            i, j = (c.clamp(0, side - 1).long() for c, side in zip((row, column), maps.shape[1:], strict=True))
            total = total + weight.to(dtype)[:, None] * maps[:, i, j].T.to(dtype)
    return total


def _fit_axis(maps: Tensor, dim: int, stride: int, pixels: int, cells: int) -> Tensor:
    """`fit_to_image` along one axis."""
    if pixels == cells * stride:
        return maps.narrow(dim, 0, cells)
    if cells == 1:
        return maps.narrow(dim, 0, 1)
    centres = (torch.arange(cells, dtype=torch.float64) + 0.5) * (pixels / (cells * stride)) - 0.5  # in cells of `maps`
    before = centres.long()  # of the first centre, which may be negative, 0
    fraction = upload(centres - before, maps.device, maps.dtype)
    shape = [-1 if axis == dim % maps.ndim else 1 for axis in range(maps.ndim)]
    before = upload(before, maps.device)
    first, second = maps.index_select(dim, before), maps.index_select(dim, before + 1)
    return torch.lerp(first, second, fraction.view(shape))

"""Values of upsampled maps at single pixels, without upsampling the maps."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffseg import geometry
from diffseg.geometry import Size, pixel_neighbours

Resize = Literal['bilinear', 'nearest']


def upsample(x: Tensor, size: Size, finest: Size, resize: Resize = 'bilinear') -> Tensor:
    """Resize a map to the size of the labels.

    Args:
        x: shape (B, C, h, w).
        size: (H, W) of the result.
        finest: (h, w) of the largest map among those to concatenate.
        resize: 'bilinear' resizes directly, as DatasetDDPM does; 'nearest' first resizes to `finest` by repeating
            cells, as GDF does.

    Returns:
        Shape (B, C, H, W).
    """
    if resize == 'nearest':
        x = F.interpolate(x, finest, mode='nearest')
    return geometry.resize(x, size)


def spread_resize(resize: Resize | Sequence[Resize], maps: int) -> list[Resize]:
    """One `resize` for each of several maps.

    Raises:
        ValueError: wrong number of values, or an unknown value.
    """
    resizes = [resize] * maps if isinstance(resize, str) else list(resize)
    if len(resizes) != maps or not set(resizes) <= set(get_args(Resize)):
        raise ValueError(f"resize is {resize!r}; it is 'bilinear' or 'nearest', for all maps or for each of {maps}")
    return resizes


def sample_pixels(
    maps: Sequence[Tensor], pixels: Tensor, size: Size, resize: Resize | Sequence[Resize] = 'bilinear'
) -> Tensor:
    """Values that `upsample` would give, concatenated, at single pixels. See `PixelGrid.sample`."""
    return PixelGrid([x.shape[1:3] for x in maps], size, resize, pixels.device).sample(maps, pixels)


class PixelGrid:
    """Positions of the pixels of a picture on smaller maps.

    Args:
        sizes: (h, w) of every map.
        size: (H, W) of the picture.
        resize: see `upsample`; one for all maps, or for each.
        device: of maps and pixels.
    """

    def __init__(
        self,
        sizes: Sequence[Size],
        size: Size,
        resize: Resize | Sequence[Resize] = 'bilinear',
        device: torch.device | str | None = None,
    ) -> None:
        self.area = size[0] * size[1]
        self.sizes = [tuple(map_size) for map_size in sizes]
        finest = tuple(np.max(self.sizes, axis=0).tolist())
        through = [
            finest if mode == 'nearest' else source
            for source, mode in zip(self.sizes, spread_resize(resize, len(self.sizes)), strict=True)
        ]
        paths = list(zip(self.sizes, through, strict=True))
        tables = {path: _corners(*path, size, device) for path in set(paths)}
        self._corners = [tables[path] for path in paths]

    def sample(self, maps: Sequence[Tensor], pixels: Tensor) -> Tensor:
        """Interpolate.

        Args:
            maps: channels last, with shapes (B, h, w, C).
            pixels: indices into the labels (B, H, W), flattened; of any shape S.

        Returns:
            Shape (*S, sum of C), float32.
        """
        image, position = pixels // self.area, pixels % self.area
        values = []
        for x, (height, width), (cells, weights) in zip(maps, self.sizes, self._corners, strict=True):
            index = cells[position] + (image * (height * width))[..., None]  # (*S, 4)
            corners = x.flatten(0, 2)[index].float()  # (*S, 4, C)
            values.append((weights[position][..., None, :] @ corners)[..., 0, :])  # (*S, C)
        return torch.cat(values, dim=-1)


def _corners(source: Size, through: Size, target: Size, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """The four cells of a map that each pixel is interpolated from, and their weights.

    Args:
        source: (h, w) of the map.
        through: (h', w') to which its cells are repeated before they are interpolated.
        target: (H, W).
        device: of the result.

    Returns:
        Indices into the flattened map and weights, with shapes (H*W, 4), int64 and float32.
    """
    (rows, down), (columns, across) = (_axis(*lengths, device) for lengths in zip(source, through, target, strict=True))
    cells = rows[:, None, :, None] * source[1] + columns[None, :, None, :]  # (H, W, 2, 2)
    weights = down[:, None, :, None] * across[None, :, None, :]
    return cells.reshape(-1, 4), weights.reshape(-1, 4)


def _axis(source: int, through: int, target: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """`_corners` along one axis: the two cells of each of `target` pixels, and their weights, (target, 2) each."""
    before, after, share = pixel_neighbours(through, target, device)
    cells = torch.stack([before, after], dim=1) * source // through
    return cells, torch.stack([1 - share, share], dim=1).float()


class LabelledPixels:
    """The labelled pixels of a few pictures, with features from maps at their original resolution.

    Args:
        maps: channels last, with shapes (B, h, w, C), any floating point type.
        labels: shape (B, H, W), on the device of the maps.
        num_classes: number of classes.
        ignore_index: label of pixels that are ignored.
        resize: of maps to the size of the labels, see `upsample`.

    Raises:
        ValueError: a label is not a class, or no pixel is labelled.
    """

    def __init__(
        self,
        maps: Sequence[Tensor],
        labels: Tensor,
        num_classes: int,
        ignore_index: int = 255,
        resize: Resize | Sequence[Resize] = 'bilinear',
    ) -> None:
        flat = labels.flatten()
        pixels = (flat != ignore_index).nonzero()[:, 0]
        if not len(pixels):
            raise ValueError(f'all {flat.numel()} pixels have the ignored label {ignore_index}')
        if (top := int(flat[pixels].max())) >= num_classes:
            raise ValueError(
                f'label {top} is no class of {num_classes}; set num_classes of the head, or ignore_label of the data'
            )
        self.maps = list(maps)
        self.labels = flat
        self.pixels = pixels.int()
        self.grid = PixelGrid([x.shape[1:3] for x in maps], labels.shape[1:], resize, labels.device)

    def __len__(self) -> int:
        return len(self.pixels)

    def permutations(self, seed: int, epoch: int, members: int, batch_size: int) -> Tensor:
        """One epoch in the order of each member; the last pixels, too few for a batch, are left out.

        Returns:
            Indices into the flattened labels with shape (iterations, batch_size, members), int32.
        """
        iterations = len(self) // batch_size
        orders = []
        for member in range(members):
            key = np.random.SeedSequence((seed, epoch, member)).generate_state(1)
            generator = torch.Generator().manual_seed(int(key[0]))
            order = torch.randperm(len(self), generator=generator, dtype=torch.int32)[: iterations * batch_size]
            orders.append(self.pixels[order.to(self.pixels.device)])
        return torch.stack(orders, dim=-1).view(iterations, batch_size, members)

    def sample(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features (*S, C) and labels (*S) of pixels of any shape S."""
        pixels = pixels.long()
        return self.grid.sample(self.maps, pixels), self.labels[pixels].long()

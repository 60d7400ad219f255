"""Matching the descriptors of two images.

Points are (x, y) in whole pixels, and maps of descriptors have shape (C, h, w). "Upsampled" means bilinearly and with
`align_corners=False`, as `torch.nn.functional.interpolate` does it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torch.linalg import vecdot

from diffseg.geometry import Size, cells_to_pixels, pixel_neighbours, pixels_to_cells, precision, resize, sample_points

CHUNK = 2**20  # similarities in memory at once
CHANNELS = 2**22  # values of a map in double precision at once
QUERIES = 256  # that are matched at once

Unit = Literal['pixels', 'cells']


def match_points(
    source: Tensor,
    target: Tensor,
    points: Tensor,
    source_size: Size,
    target_size: Size,
    window: int | None = None,
    temperature: float = 0.04,
    unit: Unit = 'pixels',
) -> Tensor:
    """Match points of the source image with pixels of the target image.

    Both maps are upsampled to the size of their image, the source's descriptor is read at every point, and the target
    pixel of highest cosine similarity is its match (DIFT, arXiv 2306.03881, evaluation on SPair-71k). The upsampled
    maps are not materialised, see `UpsampledSimilarity`.

    From the centre of a border cell outwards all pixels have equal descriptors. Of equally similar pixels the first in
    row order is taken, as in DIFT and DHF up to rounding errors. So an image matches itself exactly except there.

    With the unit 'cells' nothing is upsampled: the descriptor of the cell in which a point lies is compared with those
    of the target's cells, and the match is the centre of the most similar one, or the mean of a window of cells around
    it. With a window of 11 cells and a temperature of 0.02 this is the window soft-argmax that GeoAware-SC
    (arXiv 2311.17034, section 4.4) uses zero-shot, with 15 cells that of its trained models. Unlike GeoAware-SC, cells
    outside of the window have no weight; there they have that of similarity 0. Unlike there, the centre of a cell is
    not rounded to a pixel.

    Args:
        source: descriptors with shape (C, h, w).
        target: descriptors with shape (C, h', w').
        points: with shape (N, 2).
        source_size: height and width of the source image in pixels.
        target_size: height and width of the target image in pixels.
        window: refine matches within a window of this side, see `UpsampledSimilarity.soft_argmax`.
        temperature: of the refinement.
        unit: of matches and of the window, 'pixels' of the image or 'cells' of the map.

    Returns:
        (x, y) in pixels of the target image, with shape (N, 2); int64, or floating point if refined or of cells.

    Raises:
        ValueError: a point is outside of the source image, the maps differ in channels, or the unit is unknown.
    """
    if unit not in get_args(Unit):
        raise ValueError(f'unit is {unit!r}; it is {" or ".join(map(repr, get_args(Unit)))}')
    if unit == 'cells':
        height, width = source.shape[1:]
        cells = pixels_to_cells(points, source_size, (height, width)).round()
        cells = torch.minimum(cells.clamp(min=0), cells.new_tensor([width - 1, height - 1]))
        queries, size = descriptors_at(source, cells, (height, width)), tuple(target.shape[1:])
    else:
        queries, size = descriptors_at(source, points, source_size), target_size
    matches = []
    for part in queries.split(QUERIES):
        similarity = UpsampledSimilarity.of(part, target, size)
        matches.append(similarity.argmax() if window is None else similarity.soft_argmax(window, temperature))
    return torch.cat(matches) if unit == 'pixels' else cells_to_pixels(torch.cat(matches), target_size, size)


def descriptors_at(maps: Tensor, points: Tensor, size: Size) -> Tensor:
    """Descriptors of a map, upsampled to `size`, at some points.

    Args:
        maps: with shape (C, h, w).
        points: with shape (N, 2).
        size: height and width in pixels.

    Returns:
        Shape (N, C), in the precision in which similarities are computed.

    Raises:
        ValueError: a point is outside of the image.
    """
    height, width = size
    x, y = points.long().to(maps.device).unbind(dim=-1)
    if ((x < 0) | (y < 0) | (x >= width) | (y >= height)).any():
        raise ValueError(
            f'points {points.tolist()} are not all inside the source image of {width} x {height} pixels (x, y)'
        )
    return sample_points(maps, torch.stack([x, y], dim=-1), size, dtype=precision(maps.device))


def upsampled_similarity(queries: Tensor, maps: Tensor, size: Size) -> Tensor:
    """Cosine similarity of K queries with every pixel of an upsampled map, in plain lines.

    Reference implementation of `UpsampledSimilarity`, which does not need the upsampled map of C x H x W values.

    Args:
        queries: descriptors with shape (K, C).
        maps: with shape (C, h, w).
        size: height H and width W in pixels to which the map is upsampled.

    Returns:
        Shape (K, H, W), in double precision where the device has it.
    """
    dtype = precision(maps.device)
    upsampled = resize(maps[None].to(dtype), size)[0]  # (C, H, W)
    pixels = F.normalize(upsampled.flatten(1), dim=0)  # (C, H*W)
    return (F.normalize(queries.to(dtype), dim=1) @ pixels).unflatten(1, size)


@dataclass(frozen=True)
class UpsampledSimilarity:
    """`upsampled_similarity`, evaluated at some pixels only.

    A pixel's descriptor is v = sum_i w_i f_i over the four cells around it. So the product <q, v> = sum_i w_i <q, f_i>
    is the upsampled map of the cells' products, and |v|^2 = sum_ij w_i w_j <f_i, f_j> follows from the products of
    neighbouring cells. Both cost C operations per cell and a few per pixel, where upsampling the map costs C per pixel.

    Everything is computed in double precision, except on devices that have none (MPS). Values interpolated along the
    rows are stored; a pixel takes one more interpolation, between two rows.

    Attributes:
        dots: products with the queries, shape (K, h, W).
        squares: squared norms within each row of cells, shape (h, W).
        crosses: products of each row of cells with the next, shape (h, W).
        top: the row of cells above each row of pixels, shape (H,).
        bottom: the row of cells below it, shape (H,).
        fraction: of the way from one to the other, shape (H,).
    """

    dots: Tensor
    squares: Tensor
    crosses: Tensor
    top: Tensor
    bottom: Tensor
    fraction: Tensor

    @classmethod
    def of(cls, queries: Tensor, maps: Tensor, size: Size) -> 'UpsampledSimilarity':
        """Prepare.

        Args:
            queries: descriptors with shape (K, C), of any nonzero norm.
            maps: with shape (C, h, w).
            size: height H and width W in pixels to which the map is upsampled.

        Raises:
            ValueError: the queries and the map differ in channels.
        """
        if queries.shape[1] != maps.shape[0]:
            raise ValueError(
                f'queries have {queries.shape[1]} channels and the map {maps.shape[0]}; both must come from one model'
            )
        return cls.from_cells(cell_products(F.normalize(queries.to(precision(queries.device)), dim=1), maps), size)

    @classmethod
    def from_cells(cls, products: Sequence[Tensor], size: Size) -> 'UpsampledSimilarity':
        """Prepare from `cell_products`. Products of concatenated maps are the sums of the products of each map.

        Args:
            products: of queries and cells; similarities are cosines if the queries have unit length.
            size: height H and width W in pixels to which the map is upsampled.
        """
        dots, norm, along, cross, diagonals = products
        left, right, b = pixel_neighbours(dots.shape[2], size[1], dots.device)
        a = 1 - b
        return cls(
            torch.lerp(dots[..., left], dots[..., right], b),
            a * a * norm[:, left] + 2 * a * b * along[:, left] + b * b * norm[:, right],
            a * a * cross[:, left] + a * b * diagonals[:, left] + b * b * cross[:, right],
            *pixel_neighbours(dots.shape[1], size[0], dots.device),
        )

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return len(self.top), self.dots.shape[2]

    def at(self, query: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Similarities at some pixels.

        Args:
            query: indices of queries, which broadcast with y and x.
            y: rows.
            x: columns.
        """
        top, bottom, c = self.top[y], self.bottom[y], self.fraction[y]
        dots = torch.lerp(self.dots[query, top, x], self.dots[query, bottom, x], c)
        return dots / self._norm(self.squares[top, x], self.squares[bottom, x], self.crosses[top, x], c)

    def rows(self, first: int, last: int) -> Tensor:
        """Similarities at the pixels of rows `first` to `last` (exclusive), shape (K, last - first, W)."""
        top, bottom, c = self.top[first:last], self.bottom[first:last], self.fraction[first:last, None]
        dots = torch.lerp(self.dots[:, top], self.dots[:, bottom], c)
        return dots / self._norm(self.squares[top], self.squares[bottom], self.crosses[top], c)

    def argmax(self, chunk: int = CHUNK) -> Tensor:
        """The most similar pixel of each query; of equal ones the first, row by row.

        Args:
            chunk: number of similarities in memory at once.

        Returns:
            (x, y) with shape (K, 2), int64.
        """
        height, width = self.size
        step = max(1, chunk // max(1, len(self.dots) * width))
        best = self.dots.new_full((len(self.dots),), -torch.inf)
        index = torch.zeros_like(best, dtype=torch.long)
        for first in range(0, height, step):
            similarity = self.rows(first, first + step).flatten(1)  # (K, step * W)
            position = similarity.argmax(1)
            value = similarity.gather(1, position[:, None])[:, 0]
            better = value > best
            best = torch.where(better, value, best)
            index = torch.where(better, position + first * width, index)
        return torch.stack([index % width, index // width], dim=1)

    def soft_argmax(self, window: int, temperature: float = 0.04) -> Tensor:
        """The mean position around the most similar pixel, weighted by a softmax: sub-pixel.

        Args:
            window: side in pixels, odd, of the square that is averaged over; it is clipped at the borders.
            temperature: by which similarities are divided before the softmax.

        Returns:
            (x, y) with shape (K, 2), floating point.

        Raises:
            ValueError: the window is even or not positive.
        """
        if window < 1 or window % 2 == 0:
            raise ValueError(f'window is {window}; it is an odd number of pixels, so that it has a middle')
        height, width = self.size
        offsets = torch.arange(window, device=self.dots.device) - window // 2
        x, y = self.argmax().unbind(1)
        x, y = x[:, None, None] + offsets, y[:, None, None] + offsets[:, None]  # (K, 1, s), (K, s, 1)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)  # (K, s, s)
        queries = torch.arange(len(self.dots), device=self.dots.device)[:, None, None]
        logits = self.at(queries, y.clamp(0, height - 1), x.clamp(0, width - 1)) / temperature
        weights = logits.masked_fill(~inside, -torch.inf).flatten(1).softmax(1).view_as(logits)
        return torch.stack([(weights * x).sum((1, 2)), (weights * y).sum((1, 2))], dim=1)

    @staticmethod
    def _norm(upper: Tensor, lower: Tensor, cross: Tensor, c: Tensor) -> Tensor:
        square = (1 - c) ** 2 * upper + 2 * c * (1 - c) * cross + c**2 * lower
        return square.clamp_min(1e-24).sqrt()


def mutual_distance(source: Tensor, target: Tensor) -> float:
    """Mean distance of the descriptors, of unit length, of cells that are each other's nearest neighbour.

    GeoAware-SC (arXiv 2311.17034, section 4.1) compares the poses of two images by it.

    Args:
        source: with shape (C, h, w).
        target: with shape (C, h', w').
    """
    cells = [F.normalize(maps.flatten(1).T.to(precision(maps.device)), dim=1) for maps in (source, target)]  # (h*w, C)
    rows = mutual_nearest_neighbours(*cells)
    return torch.linalg.vector_norm(cells[0][rows[:, 0]] - cells[1][rows[:, 1]], dim=1).mean().item()


def mutual_nearest_neighbours(
    source: Tensor, target: Tensor, metric: Literal['cosine', 'l2'] = 'cosine', chunk: int = CHUNK
) -> Tensor:
    """Pairs of descriptors that are each other's nearest neighbour.

    Args:
        source: with shape (N, C).
        target: with shape (M, C).
        metric: of nearest neighbours.
        chunk: number of similarities in memory at once.

    Returns:
        Indices into source and target with shape (P, 2), in the order of the source.

    Raises:
        ValueError: on another metric.
    """
    if metric not in ('cosine', 'l2'):
        raise ValueError(f"metric is {metric!r}; it is 'cosine' or 'l2'")
    if not len(source) or not len(target):
        return torch.empty(0, 2, dtype=torch.long, device=source.device)
    if metric == 'cosine':
        source, target = F.normalize(source, dim=1), F.normalize(target, dim=1)
    forward = []
    best = source.new_full((len(target),), -torch.inf)
    backward = torch.zeros_like(best, dtype=torch.long)
    step = max(1, chunk // len(target))
    for first in range(0, len(source), step):
        part = source[first : first + step]
        similarity = part @ target.T  # (n, M)
        if metric == 'l2':  # -|a - b|^2
            similarity = 2 * similarity - part.square().sum(1)[:, None] - target.square().sum(1)
        forward.append(similarity.argmax(1))
        position = similarity.argmax(0)
        value = similarity.gather(0, position[None])[0]
        better = value > best
        best = torch.where(better, value, best)
        backward = torch.where(better, position + first, backward)
    forward = torch.cat(forward)
    indices = torch.arange(len(source), device=source.device)
    mutual = backward[forward] == indices
    return torch.stack([indices[mutual], forward[mutual]], dim=1)


def best_buddies(
    source: Tensor,
    target: Tensor,
    num_pairs: int = 10,
    source_saliency: Tensor | None = None,
    target_saliency: Tensor | None = None,
    threshold: float = 0.05,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Select a few good, well distributed matches of two maps without annotation (the demo of DHF, arXiv 2305.14334).

    Cells that are each other's nearest neighbour, and both salient, are clustered (k-means) by descriptor; the most
    salient pair of each cluster is selected.

    Unlike DHF, both cells of a pair must be salient; there it suffices for the target if a salient cell of it has the
    pair's source cell as its nearest neighbour. Unlike DHF, coordinates are whole cells; there y is `index / width`.

    Args:
        source: with shape (C, h, w).
        target: with shape (C, h', w').
        num_pairs: largest number of pairs.
        source_saliency: in [0, 1] with shape (h, w); uniform if None.
        target_saliency: with shape (h', w').
        threshold: smallest saliency (exclusive).
        seed: of the clustering.

    Returns:
        (x, y) in cells of the source and of the target, each with shape (P, 2).
    """
    maps = source, target
    saliencies = [
        x.new_ones(x.shape[1:]) if saliency is None else saliency.to(x)
        for x, saliency in zip(maps, (source_saliency, target_saliency), strict=True)
    ]
    descriptors = [F.normalize(x.flatten(1).T, dim=1) for x in maps]  # (h*w, C)
    pairs = mutual_nearest_neighbours(*descriptors)
    saliency = torch.stack([s.flatten()[i] for s, i in zip(saliencies, pairs.T, strict=True)])  # (2, P)
    salient = (saliency > threshold).all(0)
    pairs, saliency = pairs[salient], saliency[:, salient].mean(0)
    if len(pairs) > num_pairs:
        joint = torch.cat([x[i] for x, i in zip(descriptors, pairs.T, strict=True)], dim=1)
        _, labels = kmeans2(joint.double().cpu().numpy(), num_pairs, minit='++', seed=seed)
        labels = torch.from_numpy(labels).to(saliency.device)
        chosen = [torch.where(labels == label, saliency, -torch.inf).argmax() for label in labels.unique()]
        pairs = pairs[torch.stack(chosen)]
    points = [torch.stack([i % x.shape[2], i // x.shape[2]], dim=1) for x, i in zip(maps, pairs.T, strict=True)]
    return points[0], points[1]


def cell_products(queries: Tensor, maps: Tensor) -> list[Tensor]:
    """Sums over channels, in few large operations.

    Args:
        queries: with shape (K, C), in double precision where the device has it.
        maps: with shape (C, h, w).

    Returns:
        The products of all cells with the queries (K, h, w); and of cells with themselves, the cell on the right, the
        cell below, and of both diagonals, summed, each (h, w). Without such a cell the product is 0.
    """
    step = max(1, CHANNELS // maps[0].numel())
    dtype = precision(maps.device)
    total: list[Tensor | float] = [0.0] * 5
    for q, part in zip(queries.split(step, 1), maps.split(step), strict=True):
        f = part.permute(1, 2, 0).to(dtype, memory_format=torch.contiguous_format)  # (h, w, c)
        products = [
            torch.einsum('kc,hwc->khw', q, f),
            vecdot(f, f),
            F.pad(vecdot(f[:, :-1], f[:, 1:]), (0, 1)),
            F.pad(vecdot(f[:-1], f[1:]), (0, 0, 0, 1)),
            F.pad(vecdot(f[:-1, :-1], f[1:, 1:]) + vecdot(f[:-1, 1:], f[1:, :-1]), (0, 1, 0, 1)),
        ]
        total = [old + new for old, new in zip(total, products, strict=True)]
    return total

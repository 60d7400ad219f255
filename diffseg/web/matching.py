"""Matches of a point of one picture in many others, at the speed of a moving pointer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffseg.geometry import Size, cells_to_pixels, pixels_to_cells, sample_points

from .features import Descriptors

MUTUAL = 1.5  # cells between a point and the match of its match, along either axis
STEPS = 8  # positions in a cell, along either axis, among which the best is chosen


@dataclass(frozen=True)
class Match:
    """Match of a point in one picture.

    Attributes:
        similarity: cosine with every cell, shape (h*w,).
        point: (x, y), in pixels, where the bilinearly upsampled map is most similar.
        score: cosine there.
        back: (x, y), in the source, of the best cell for the descriptor at `point`.
        mutual: whether it lies at the query's point, or at one of them.
    """

    similarity: Tensor
    point: tuple[float, float]
    score: float
    back: tuple[float, float]
    mutual: bool


def query_of(source: Descriptors, points: Tensor, size: Size) -> Tensor:
    """Mean of the unit descriptors at some points, of unit length.

    Args:
        source: of the picture.
        points: (x, y) in its pixels, with shape (N, 2).
        size: height and width of the picture.

    Returns:
        Shape (C,).
    """
    descriptors = sample_points(source.map, points, size, dtype=torch.float32)
    return F.normalize(F.normalize(descriptors, dim=1).mean(0), dim=0)


@torch.inference_mode()
def match_all(
    source: Descriptors, points: Tensor, size: Size, targets: Sequence[tuple[Descriptors, Size]]
) -> list[Match]:
    """Match the mean of some points of one picture with others.

    The similarities with a picture's cells are one product of a matrix with a vector. Around the best cell the map is
    then interpolated bilinearly, as in `match_points`, at `STEPS` positions a cell.

    Args:
        source: of the picture with the points.
        points: (x, y) in its pixels, with shape (N, 2).
        size: its height and width.
        targets: descriptors, height and width of the others.
    """
    if not targets:
        return []
    query = query_of(source, points, size)
    similarities = [(target.cells @ query.to(target.cells.dtype)).float() for target, _ in targets]
    best = [divmod(int(x.argmax()), target.grid[1]) for x, (target, _) in zip(similarities, targets, strict=True)]
    patches = [neighbours(target, *cell) for cell, (target, _) in zip(best, targets, strict=True)]
    offsets, scores, descriptors = refine(query, torch.stack(patches))
    returns = (source.cells @ descriptors.T.to(source.cells.dtype)).argmax(0)  # of all targets together
    width = source.grid[1]
    cells = torch.stack([returns % width, returns // width], dim=1).double()  # (N, 2)
    distances = (cells[:, None] - pixels_to_cells(points, size, source.grid)).abs().amax(2).amin(1)
    back = cells_to_pixels(cells, size, source.grid)
    matches = []
    for i, ((row, column), (target, target_size)) in enumerate(zip(best, targets, strict=True)):
        cell = torch.tensor([column, row]) + offsets[i]
        cell = torch.minimum(cell.clamp(min=0), torch.tensor(target.grid[::-1]) - 1)  # constant beyond the last centres
        point = cells_to_pixels(cell, target_size, target.grid)
        mutual = bool(distances[i] <= MUTUAL)
        matches.append(Match(similarities[i], tuple(point.tolist()), float(scores[i]), tuple(back[i].tolist()), mutual))
    return matches


def neighbours(target: Descriptors, row: int, column: int) -> Tensor:
    """Descriptors (9, C) of a cell and those around it, row by row; beyond the border the last ones."""
    height, width = target.grid
    rows = torch.arange(row - 1, row + 2).clamp(0, height - 1)
    columns = torch.arange(column - 1, column + 2).clamp(0, width - 1)
    return target.cells[(rows[:, None] * width + columns).flatten()].float()


def refine(query: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The most similar position between cells.

    An interpolated descriptor is v = sum_i w_i f_i, so that <q, v> = sum_i w_i <q, f_i> and |v|^2 = w' G w with the
    Gram matrix G of the cells.

    Args:
        query: of unit length, shape (C,).
        patches: descriptors of 3 x 3 cells, shape (N, 9, C).

    Returns:
        (x, y) in cells from the middle one, (N, 2); cosines (N,); and descriptors there, of unit length, (N, C).
    """
    positions = torch.linspace(-1, 1, 2 * STEPS + 1)
    along = (1 - (positions[:, None] - torch.tensor([-1.0, 0.0, 1.0])).abs()).clamp(min=0)  # (P, 3)
    weights = torch.einsum('yi,xj->yxij', along, along).flatten(2).flatten(0, 1)  # (P*P, 9)
    products = patches @ query  # (N, 9)
    gram = patches @ patches.transpose(1, 2)  # (N, 9, 9)
    squares = torch.einsum('pi,nij,pj->np', weights, gram, weights)
    cosines = products @ weights.T / squares.clamp(min=1e-12).sqrt()  # (N, P*P)
    scores, index = cosines.max(1)
    rows, columns = index // len(positions), index % len(positions)
    descriptors = F.normalize((weights[index][:, None] @ patches)[:, 0], dim=1)
    return torch.stack([positions[columns], positions[rows]], dim=1), scores, descriptors

"""Propagate labels of some frames to another one, by similarity within a window."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**24  # similarities in memory at once
TILE = 10  # cells on a side, at most; larger tiles compare more cells outside of each other's windows


def propagate_labels(
    target: Tensor,
    context: Sequence[Tensor],
    labels: Sequence[Tensor],
    topk: int,
    radius: int,
    temperature: float,
    chunk: int = CHUNK,
) -> Tensor:
    """Soft labels of a frame from those of others: DIFT (arXiv 2306.03881) on DAVIS, with DINO's protocol.

    A cell's label is the mean label of its most similar cells, among those in the window around it in all frames of the
    context, weighted with `exp(cosine / temperature)`. The `topk` most similar ones are averaged; more if several tie
    with the last of them, and all if the windows have fewer. There are no cells beyond the border.

    The published code multiplies all cells of the context with all cells of the target, and then zeroes what is outside
    of windows. Here the target is cut into tiles, and a tile is multiplied only with what its windows reach.

    Args:
        target: descriptors with shape (C, h, w). They may have any norm and precision; similarities are computed in
            single precision, on the target's device.
        context: descriptors of n frames, each with shape (C, h, w), on any device. Fastest in the channels-last memory
            format.
        labels: of these frames, each with shape (K, h, w).
        topk: number of cells to average.
        radius: of the window, which is a square of `2 * radius + 1` cells.
        temperature: of the weights.
        chunk: number of similarities in memory at once, at least those of one cell.

    Returns:
        Shape (K, h, w). Sums to one over the labels of a cell if those of the context do.

    Raises:
        ValueError: shapes do not match, or a number is out of range.
    """
    _check(target, context, labels, topk, radius, temperature)
    h, w = target.shape[1:]
    queries = F.normalize(target.float(), dim=0) / temperature
    norms = [frame.norm(dim=0, dtype=torch.float32).clamp_min(1e-12) for frame in context]  # n times (h, w)
    side = _tile_side(h, w, radius, len(context), chunk)
    result = queries.new_empty(labels[0].shape)
    for top in range(0, h, side):
        rows, near_rows, within_rows = _reach(top, side, radius, h, target.device)
        for left in range(0, w, side):
            columns, near_columns, within_columns = _reach(left, side, radius, w, target.device)
            near = ..., near_rows, near_columns
            query = _cells(queries[..., rows, columns])  # (q, C)
            within = (within_rows[:, None, :, None] & within_columns[:, None, :]).flatten(2).flatten(0, 1)  # (q, c)
            logits = query.new_empty(len(query), len(context), within.shape[1])  # (q, n, c)
            for i, (frame, norm) in enumerate(zip(context, norms, strict=True)):
                logits[:, i] = query @ _cells(frame[near]).to(query).T / norm[near].flatten().to(query)
            weights = _weights(logits, within, topk)
            propagated = sum(weights[:, i] @ _cells(label[near]).to(query) for i, label in enumerate(labels))  # (q, K)
            result[..., rows, columns] = propagated.T.unflatten(1, (-1, within_columns.shape[0]))
    return result


def _weights(logits: Tensor, within: Tensor, topk: int) -> Tensor:
    """Softmax over the highest logits.

    Args:
        logits: of q queries with c cells of n frames, shape (q, n, c); overwritten.
        within: which cells are in a query's window, shape (q, c).
        topk: number of logits of a query to keep, over all frames.
    """
    flat = logits.masked_fill_(~within[:, None], -torch.inf).flatten(1)  # (q, n*c)
    least = flat.topk(min(topk, flat.shape[1]), sorted=False).values.amin(1, keepdim=True)
    return flat.masked_fill_(flat < least, -torch.inf).softmax(1).view_as(logits)


def _cells(maps: Tensor) -> Tensor:
    """(C, h, w) -> (h*w, C)."""
    return maps.permute(1, 2, 0).flatten(0, 1)


def _reach(start: int, side: int, radius: int, size: int, device: torch.device) -> tuple[slice, slice, Tensor]:
    """Along one axis: the cells of a tile, the cells that its windows reach, and which of them are in which window.

    Returns:
        Slices of q and of c cells, and a mask with shape (q, c).
    """
    first, last = max(start - radius, 0), min(start + side + radius, size)
    tile = torch.arange(start, min(start + side, size), device=device)
    near = torch.arange(first, last, device=device)
    return slice(start, start + side), slice(first, last), (tile[:, None] - near).abs() <= radius


def _tile_side(h: int, w: int, radius: int, frames: int, chunk: int) -> int:
    """The largest side of a tile with at most `chunk` similarities; at least 1."""
    for side in range(TILE, 1, -1):
        if side**2 * min(h, side + 2 * radius) * min(w, side + 2 * radius) * frames <= chunk:
            return side
    return 1


def _check(
    target: Tensor, context: Sequence[Tensor], labels: Sequence[Tensor], topk: int, radius: int, temperature: float
) -> None:
    """Raise a ValueError for invalid arguments of `propagate_labels`."""
    if not len(context) or len(context) != len(labels):
        raise ValueError(f'there are {len(context)} frames of context and labels of {len(labels)}; give both for each')
    if unlike := {tuple(frame.shape) for frame in context} - {tuple(target.shape)}:
        raise ValueError(f'descriptors of the context have shapes {unlike}, the target has {tuple(target.shape)}')
    shapes = {tuple(label.shape) for label in labels}
    if len(shapes) > 1 or labels[0].shape[1:] != target.shape[1:]:
        raise ValueError(f"labels have shapes {shapes}; they are (K, h, w) with the target's {tuple(target.shape[1:])}")
    if topk < 1 or radius < 0 or temperature <= 0:
        raise ValueError(
            f'topk is {topk}, radius is {radius}, temperature is {temperature}; at least 1, at least 0, above 0'
        )

"""Strokes over toy quadrupeds, as a person would paint them, for the explorer."""

import numpy as np

CLASSES = (('background', '#767f89'), ('trunk', '#e8553a'), ('head', '#2f7de1'), ('legs', '#1f9d55'))
MERGED = np.array([0, 1, 1, 2, 2, 3, 3, 1], np.uint8)  # class of each part in `diffseg.datasets.toy.PARTS`


def merge_parts(mask: np.ndarray) -> np.ndarray:
    """Labels (H, W) of `CLASSES` from a mask of parts."""
    return MERGED[mask]


def draw_stroke(mask: np.ndarray) -> list[list[float]]:
    """Ends (x, y) of the longest straight stroke inside a mask (H, W) from the pixel deepest in it to one nearly so.

    Raises:
        ValueError: the mask is empty.
    """
    if not mask.any():
        raise ValueError('there is nothing to paint')
    depth, inner = mask.astype(int), mask
    while inner.any():  # erode
        padded = np.pad(inner, 1)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        depth += inner
    rows, columns = np.nonzero(depth >= max(1, 0.6 * depth.max()))
    start = np.array(np.unravel_index(depth.argmax(), depth.shape)[::-1])
    ends = np.stack([columns, rows], axis=1)

    def length(end: np.ndarray) -> float:
        x, y = np.linspace(start, end, 64).round().astype(int).T
        return np.linalg.norm(end - start) if mask[y, x].all() else 0

    return [start.astype(float).tolist(), max(ends, key=length).astype(float).tolist()]

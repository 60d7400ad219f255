"""A pixel classifier that is fitted on a few strokes while they are painted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffseg.geometry import Size, resize, sample_points
from diffseg.models.decode_heads.pixel_classifier import js_uncertainty, most_uncertain
from diffseg.visualization import principal_axes

from .features import Descriptors
from .strokes import UNLABELLED, Annotations

COMPONENTS = 64  # of descriptors that the classifier sees
SAMPLED = 8192  # cells, of all pictures, from which components are computed
MEMBERS = 5
PENALTY = 0.01  # on the square of weights, where the mean cross-entropy counts 1
ITERATIONS = 30
PIXELS = 400  # of a stroke that are fitted
IMPORTED = 2000  # likewise of a picture whose labels were imported
TOTAL = 8_000  # pixels of all strokes, so that fitting stays fast
GRID = 96  # longest side on which masks are predicted
COARSE = 32  # on which pictures are compared by their uncertainty


class Projection:
    """The first principal components of descriptors of all pictures, in units of the first one's deviation.

    Args:
        cells: descriptors of some cells, with shape (N, C), float32.
    """

    def __init__(self, cells: Tensor) -> None:
        self.mean, axes = principal_axes(cells, COMPONENTS)
        self.axes = axes / ((cells - self.mean) @ axes[:, :1]).std().clamp(min=1e-6)  # (C, D)

    @staticmethod
    def step(grids: Sequence[Size]) -> int:
        """Every how many cells one is taken from pictures with these grids."""
        return -(-sum(height * width for height, width in grids) // SAMPLED)

    def __call__(self, descriptors: Descriptors) -> Tensor:
        """A picture's map (D, h, w)."""
        return ((descriptors.cells.float() - self.mean) @ self.axes).T.unflatten(1, descriptors.grid)


@dataclass(frozen=True)
class LabelledPixels:
    """Features (N, D) and labels (N,) of pixels, and of which group (a stroke, or a picture) each is, (N,)."""

    features: Tensor
    labels: Tensor
    groups: Tensor


def labelled_pixels(annotations: Annotations, maps: dict[str, tuple[Tensor, Size]]) -> LabelledPixels:
    """Draw pixels from strokes and imported labels; the same ones every time.

    Args:
        annotations: classes and strokes.
        maps: for each picture's name its map (D, h, w), and height and width of the picture.
    """
    drawn = []  # picture, rows and columns of a group, and their labels
    for name, (_, size) in maps.items():
        raster, numbers = annotations.raster(name, size), annotations.pixels(name, size)
        for number in np.unique(numbers[raster != UNLABELLED]).tolist():
            rows, columns = np.nonzero((numbers == number) & (raster != UNLABELLED))
            order = np.random.default_rng(number).permutation(len(rows))[: PIXELS if number else IMPORTED]
            drawn.append((name, rows[order], columns[order], raster[rows[order], columns[order]]))
    share = min(1.0, TOTAL / max(1, sum(len(rows) for _, rows, _, _ in drawn)))
    features, labels, groups = [], [], []
    for name, rows, columns, values in drawn:
        kept = slice(max(1, round(share * len(rows))))
        points = torch.from_numpy(np.stack([columns[kept], rows[kept]], axis=1))
        features.append(sample_points(maps[name][0], points, maps[name][1]))
        labels.append(torch.from_numpy(values[kept].astype(np.int64)))
        groups.append(torch.full((len(points),), len(groups)))
    if not features:
        return LabelledPixels(torch.empty(0, COMPONENTS), *torch.empty(2, 0, dtype=torch.long))
    return LabelledPixels(torch.cat(features), torch.cat(labels), torch.cat(groups))


class PixelClassifier:
    """Logistic regressions that differ in the weights of the strokes that they are fitted to.

    With a few strokes, whose pixels are alike, wider networks gain nothing and take longer. The weights of strokes are
    drawn from an exponential distribution, the Bayesian bootstrap (Rubin, 1981), so that members disagree about what
    single strokes decide.

    Args:
        pixels: with labels of at least two classes.
        classes: number of classes. Those without a pixel are never predicted.
    """

    def __init__(self, pixels: LabelledPixels, classes: int) -> None:
        present = pixels.labels.unique()
        targets = torch.searchsorted(present, pixels.labels).repeat(MEMBERS)
        inputs = F.pad(pixels.features, (0, 1), value=1.0)  # (N, D + 1)
        generator = torch.Generator().manual_seed(0)
        shares = torch.empty(MEMBERS, int(pixels.groups.max()) + 1).exponential_(generator=generator)
        shares = F.normalize(shares[:, pixels.groups], p=1, dim=1)  # (M, N)
        weights = inputs.new_zeros(inputs.shape[1], MEMBERS * len(present), requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=ITERATIONS, line_search_fn='strong_wolfe')

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = (inputs @ weights).unflatten(1, (MEMBERS, -1)).transpose(0, 1)  # (M, N, K)
            errors = F.cross_entropy(logits.flatten(0, 1), targets, reduction='none')
            total = (errors.view(MEMBERS, -1) * shares).sum() + PENALTY * weights[:-1].square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        self.classes = classes
        self.present = present
        self.weights = weights.detach()

    def logits(self, x: Tensor) -> Tensor:
        """Logits (h, w, M, K) of all members for the classes that are present, of a map (D, h, w)."""
        values = torch.einsum('dhw,do->hwo', x, self.weights[:-1]) + self.weights[-1]
        return values.unflatten(2, (MEMBERS, -1))

    def predict(self, x: Tensor, side: int = GRID) -> tuple[Tensor, Tensor]:
        """Probabilities and uncertainty.

        Args:
            x: map of a picture, (D, h, w).
            side: longest side, in cells, of the result.

        Returns:
            Probabilities (K', H', W') of all K' classes, and the Jensen-Shannon divergence of the members, in nats,
            (H', W').
        """
        logits = self.logits(resize(x[None], grid_of(x.shape[1:], side))[0])
        mean = logits.softmax(-1).mean(2).permute(2, 0, 1)  # (K, H', W')
        full = mean.new_zeros(self.classes, *mean.shape[1:])
        full[self.present] = mean
        return full, js_uncertainty(logits)

    def mask(self, x: Tensor, size: Size) -> np.ndarray:
        """Classes of all pixels (H, W), uint8: of probabilities interpolated to the picture's size."""
        return resize(self.predict(x)[0][None], size)[0].argmax(0).numpy().astype(np.uint8)

    def score(self, x: Tensor) -> float:
        """Uncertainty of a picture: the mean of its most uncertain tenth, in nats."""
        return most_uncertain(self.predict(x, COARSE)[1][None]).item()


def grid_of(cells: Size, side: int) -> Size:
    """Cells of a finer or coarser grid of the same shape, the longer side `side`."""
    factor = side / max(cells)
    return tuple(max(1, round(n * factor)) for n in cells)

"""A linear probe: how well linear functions of the maps separate the classes of pixels."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from mmseg.structures import SegDataSample
from torch import Tensor

from diffseg.geometry import sample_points

from .grid import Candidate, Maps, Reduction

IGNORED = 255
DIM = 128
PIXELS = 32  # of a class in a picture
CLASSES = 8  # of a picture, in estimates


class LinearProbe:
    """Cross-validated mIoU of ridge regression on one-hot labels, in percent.

    The same number of pixels is drawn from every class in a picture, so that small classes are represented. A drawn
    pixel represents the area of its class in the picture: confusions are weighted by area, as if all pixels were used.
    In the fit a class has the weight of the square root of its area. With its area as weight, least squares would
    hardly ever predict a small class, and with equal weights too often; the ranking of activations would then agree
    less with that of trained heads.

    The maps are sampled bilinearly, as mmseg upsamples predictions (linear functions and interpolation commute), and
    every channel is standardised. The pictures are divided into `folds`; each fold is predicted by the weights fitted
    to the others, and the confusions of all folds are added before IoU is computed. The solution has a closed form in
    products of channels, which are cached, so that probing a set costs hardly more than probing one candidate.

    Args:
        pixels: of each class in a picture, at most.
        dim: see `Measure`.
        folds: parts into which pictures are divided.
        ridge: strength of the penalty, relative to the mean squared norm of the channels.
    """

    name = 'mIoU'
    dim = DIM

    def __init__(self, *, pixels: int = PIXELS, dim: int = DIM, folds: int = 5, ridge: float = 0.1) -> None:
        self.pixels = pixels
        self.dim = dim
        self.folds = folds
        self.ridge = ridge
        self._sums: _Sums | None = None

    def reduce(self, sample: SegDataSample, maps: Maps) -> dict[Candidate | str, Tensor]:
        """Features of N drawn pixels (N, C), float16, and their labels and areas; empty without labelled pixels."""
        labels = sample.gt_sem_seg.data[0].cpu()  # (H, W)
        drawn, areas = draw_pixels(labels, self.pixels)
        if not len(drawn):
            return {}
        digest = hashlib.sha256(labels.contiguous().numpy().tobytes()).digest()
        reduction: dict[Candidate | str, Tensor] = {
            'labels': labels.flatten()[drawn],
            'areas': areas,
            'picture': torch.tensor(int.from_bytes(digest[:7], 'big')),
        }
        points = torch.stack([drawn % labels.shape[1], drawn // labels.shape[1]], dim=1)  # (N, 2)
        for candidate, x in maps.items():
            reduction[candidate] = sample_points(x.float(), points, labels.shape).to('cpu', torch.float16)
        return reduction

    def score(self, reductions: Sequence[Reduction], candidates: Sequence[Candidate]) -> float:
        """The mIoU of candidates together, over the classes that occur.

        Raises:
            ValueError: there are fewer pictures than folds.
        """
        if self._sums is None or self._sums.reductions is not reductions:
            self._sums = _Sums(reductions, self.folds)
        return self._sums.probe(candidates, self.ridge)

    @staticmethod
    def nbytes(channels: int, cells: int) -> int:
        """Two bytes for each channel of a drawn pixel."""
        return 2 * channels * PIXELS * CLASSES


def draw_pixels(labels: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """Draw pixels of every class; equal labels give equal pixels.

    Args:
        labels: shape (H, W), 255 where unlabelled.
        pixels: of each class, at most.

    Returns:
        Indices of the pixels, row by row, with shape (N,), and the area that each represents, float32 (N,).
    """
    generator = torch.Generator().manual_seed(0)
    drawn, areas = [torch.empty(0, dtype=torch.long)], [torch.empty(0)]
    for label in labels.unique().tolist():
        if label != IGNORED:
            members = (labels == label).flatten().nonzero()[:, 0]
            chosen = members[torch.randperm(len(members), generator=generator)[:pixels]]
            drawn.append(chosen)
            areas.append(torch.full((len(chosen),), len(members) / len(chosen)))
    return torch.cat(drawn), torch.cat(areas)


class _Sums:
    """Sums of products of channels over the N pixels of F folds, each computed once.

    Attributes:
        reductions: of all samples.
    """

    def __init__(self, reductions: Sequence[Reduction], folds: int) -> None:
        self.reductions = reductions
        pictures = [int(reduction['picture']) for reduction in reductions]  # several samples may show one picture
        number = {picture: i for i, picture in enumerate(dict.fromkeys(pictures))}
        if len(number) < folds:
            raise ValueError(f'{len(number)} pictures cannot be divided into {folds} folds; give more or lower `folds`')
        members = [len(reduction['labels']) for reduction in reductions]
        fold = torch.tensor([number[picture] % folds for picture in pictures]).repeat_interleave(torch.tensor(members))
        self.order = fold.argsort(stable=True)
        self.parts = fold.bincount(minlength=folds).tolist()  # pixels of each fold
        labels = torch.cat([reduction['labels'] for reduction in reductions]).long()[self.order]
        self.areas = torch.cat([reduction['areas'] for reduction in reductions]).double()[self.order]
        self.labels = labels.unique(return_inverse=True)[1]  # indices of the classes that occur
        per_class = self.labels.bincount(self.areas)
        self.weights = self.areas * per_class[self.labels].rsqrt()
        self.targets = F.one_hot(self.labels).double()  # (N, n)
        self.features = lru_cache(maxsize=32)(self._features)
        self.moments = lru_cache(maxsize=1024)(self._moments)
        self.products = lru_cache(maxsize=1024)(self._products)
        self.responses = torch.cat([self.targets, torch.ones(len(labels), 1).double()], dim=1)  # (N, n + 1)
        self.totals = self._by_fold(self.responses, self.responses)[:, -1]  # weights of classes and of all (F, n + 1)

    def probe(self, candidates: Sequence[Candidate], ridge: float) -> float:
        """Cross-validated mIoU in percent."""
        gram = self._assemble(candidates)  # (F, D, D)
        moments = torch.cat([self.moments(candidate) for candidate in candidates], dim=1)  # (F, D, n + 1)
        confusion = torch.zeros(self.targets.shape[1], self.targets.shape[1], dtype=torch.double)
        pixels = torch.arange(len(self.labels)).split(self.parts)
        for fold, held_out in enumerate(pixels):
            a, b, total = (x.sum(0) - x[fold] for x in (gram, moments, self.totals))
            weights, bias = fit_ridge(a, b[:, :-1], b[:, -1], total[:-1], total[-1], ridge)
            x = torch.cat([self.features(candidate)[held_out] for candidate in candidates], dim=1)
            predicted = (x @ weights + bias).argmax(1)
            pair = self.labels[held_out] * len(confusion) + predicted
            confusion.view(-1).index_add_(0, pair, self.areas[held_out])
        hits = confusion.diag()
        return 100 * (hits / (confusion.sum(0) + confusion.sum(1) - hits)).mean().item()

    def _assemble(self, candidates: Sequence[Candidate]) -> Tensor:
        """Products of all channels with each other (F, D, D)."""
        rows = []
        for i, row in enumerate(candidates):
            below = [self.products(column, row).mT for column in candidates[:i]]
            rows.append(torch.cat([*below, *(self.products(row, column) for column in candidates[i:])], dim=2))
        return torch.cat(rows, dim=1)

    def _features(self, candidate: Candidate) -> Tensor:
        """Standardised features with shape (N, C), sorted by fold."""
        x = torch.cat([reduction[candidate] for reduction in self.reductions]).double()[self.order]
        share = (self.areas / self.areas.sum()).unsqueeze(1)
        x = x - (share * x).sum(0)
        return x / (share * x.square()).sum(0).sqrt().clamp_min(1e-6)

    def _moments(self, candidate: Candidate) -> Tensor:
        """Weighted sums of the channels over each class and over all pixels, with shape (F, C, n + 1)."""
        return self._by_fold(self.features(candidate), self.responses)

    def _products(self, first: Candidate, second: Candidate) -> Tensor:
        """Sums of products of channels with shape (F, C, C')."""
        return self._by_fold(self.features(first), self.features(second))

    def _by_fold(self, x: Tensor, y: Tensor) -> Tensor:
        """x^T W y of the pixels of each fold, (N, C) and (N, C') -> (F, C, C')."""
        triples = zip(*(z.split(self.parts) for z in (x, self.weights, y)), strict=True)
        return torch.stack([(a * w.unsqueeze(1)).T @ b for a, w, b in triples])


def fit_ridge(
    gram: Tensor, moments: Tensor, sums: Tensor, targets: Tensor, total: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """Weighted ridge regression with an intercept, which is not penalised, from sums over pixels.

    With features x, targets y and weights w, the weights A and intercept b that minimise
    sum w |x A + b - y|^2 + ridge * mean(diag G) * |A|^2, where G is the centred Gram matrix.

    Args:
        gram: sum w x^T x with shape (D, D).
        moments: sum w x^T y with shape (D, n).
        sums: sum w x with shape (D,).
        targets: sum w y with shape (n,).
        total: sum w.
        ridge: strength of the penalty.

    Returns:
        A (D, n) and b (n,).
    """
    gram = gram - sums.outer(sums) / total
    moments = moments - sums.outer(targets) / total
    penalty = (ridge * gram.diag().mean()).clamp_min(1e-12)
    factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=gram.dtype))
    weights = torch.cholesky_solve(moments, factor)
    return weights, (targets - sums @ weights) / total

"""Zero-shot PCK of image pairs, for single candidates and for candidates that are used together."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffseg.evaluation.pck import correct_keypoints, figure_name, pck
from diffseg.geometry import resize
from diffseg.models.correspondence import CorrespondenceModel, UpsampledSimilarity
from diffseg.models.correspondence.matching import cell_products, descriptors_at
from diffseg.structures import PairSample

from .grid import Candidate, Maps, Reduction

ALPHA = 0.1
DIM = 256
KEPT = torch.float16
KEYPOINTS = 16  # of a pair, in estimates


class PairPCK:
    """PCK of each candidate alone; the reduction of a pair is which keypoints are matched correctly.

    Keypoints are matched by `CorrespondenceModel.match`, so that scores are exactly those of a model with this one
    activation.

    Args:
        model: matches the keypoints, with its `match_size` and refinement.
        dim: see `Measure`.
        device: to match on; by default that of the maps.
    """

    name = figure_name(ALPHA, 'bbox', 'image')

    def __init__(self, model: CorrespondenceModel, dim: int = DIM, device: torch.device | str | None = None) -> None:
        self.model = model
        self.dim = dim
        self.device = device

    def reduce(self, sample: PairSample, maps: Maps) -> dict[Candidate | str, Tensor]:
        """Bool (V,) for each candidate; attention is left out if its numbers of keys differ between the images."""
        truth, extent = _truth(sample)
        return {
            candidate: correct_keypoints(self.model.match(*_on(self.device, pair), sample), truth, extent, ALPHA)
            for candidate, pair in maps.items()
            if pair[0].shape[0] == pair[1].shape[0]
        }

    def score(self, reductions: Sequence[Reduction], candidates: Sequence[Candidate]) -> float:
        """PCK of one candidate.

        Raises:
            ValueError: there are several candidates.
        """
        if len(candidates) != 1:
            raise ValueError(f'{len(candidates)} candidates; JointPCK measures several together')
        return pck([reduction[candidates[0]] for reduction in reductions], 'image')

    @staticmethod
    def nbytes(channels: int, cells: int) -> int:
        """A byte for each keypoint."""
        return KEYPOINTS


class JointPCK:
    """PCK of candidates together: resized to the finest map of all, normalised in every cell, and concatenated.

    This is the result of `ConcatNeck(normalize=True)` and matching without refinement. Products of concatenated
    descriptors are sums of products: a candidate's reduction holds the products of the keypoints' descriptors with all
    cells of the target, and of neighbouring cells with each other, in half precision. Their sums determine the
    similarity of every pixel, see `UpsampledSimilarity`. So only this rounding is approximate.

    Args:
        model: defines the frame in which pairs are matched, see `CorrespondenceModel.frame`.
        dim: see `Measure`.
        device: to match on; by default the CPU.
    """

    name = PairPCK.name

    def __init__(self, model: CorrespondenceModel, dim: int = DIM, device: torch.device | str | None = None) -> None:
        self.model = model
        self.dim = dim
        self.device = device

    def reduce(self, sample: PairSample, maps: Maps) -> dict[Candidate | str, Tensor]:
        """Products (V + 4, h, w) for each candidate, and the keypoints and sizes of the pair."""
        truth, extent = _truth(sample)
        points, sizes, scale = self.model.frame(sample)
        grids = [tuple(max(pair[view].shape[axis] for pair in maps.values()) for axis in (1, 2)) for view in (0, 1)]
        reduction: dict[Candidate | str, Tensor] = {
            'points': points,
            'sizes': torch.tensor(sizes),
            'scale': scale,
            'truth': truth,
            'extent': torch.tensor(extent, dtype=torch.float64),
        }
        for candidate, pair in maps.items():
            source, target = (
                F.normalize(resize(x[None].float(), grid), dim=1)[0]
                for x, grid in zip(_on(self.device, pair), grids, strict=True)
            )
            dots, *others = cell_products(descriptors_at(source, points, sizes[0]), target)
            reduction[candidate] = torch.cat([dots, torch.stack(others)]).to('cpu', KEPT)
        return reduction

    def score(self, reductions: Sequence[Reduction], candidates: Sequence[Candidate]) -> float:
        """PCK of candidates together."""
        correct = []
        for reduction in reductions:
            points = reduction['points']
            if not len(points):
                continue
            products = sum(reduction[candidate].to(self.device).double() for candidate in candidates)
            similarity = UpsampledSimilarity.from_cells([products[:-4], *products[-4:]], reduction['sizes'][1].tolist())
            predicted = similarity.argmax().cpu().double() * reduction['scale']
            correct.append(correct_keypoints(predicted, reduction['truth'], float(reduction['extent']), ALPHA))
        return pck(correct, 'image')

    @staticmethod
    def nbytes(channels: int, cells: int) -> int:
        """A value for each keypoint and cell, and four more for each cell."""
        return (KEYPOINTS + 4) * cells * KEPT.itemsize


def _truth(sample: PairSample) -> tuple[Tensor, float]:
    """The target's visible keypoints (V, 2), and the longer side of its box."""
    x1, y1, x2, y2 = sample.bbox1.tolist()
    return sample.keypoints1[sample.visible].double(), max(x2 - x1, y2 - y1)


def _on(device: torch.device | str | None, pair: Sequence[Tensor]) -> list[Tensor]:
    return [x.to(device) for x in pair]

"""How well a distilled network agrees with its teacher."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmseg.registry import METRICS

from .common import check_results

MEASURED = ('cosine', 'cosine_plain', 'cosine_frozen')


@METRICS.register_module()
class AgreementMetric(BaseMetric):
    """Mean over images of the cosines that `CleanDistiller.predict` measures.

    `cosine` is that of the student's maps behind the heads, `cosine_plain` that of the maps before them, and
    `cosine_frozen` that of the frozen network's maps of the clean latent, which training does not change.
    """

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Store the cosines of each image."""
        self.results += [[sample[name] for name in MEASURED] for sample in data_samples]

    def compute_metrics(self, results: list[list[float]]) -> dict[str, float]:
        """The means."""
        check_results(results, 'picture')
        return dict(zip(MEASURED, torch.tensor(results, dtype=torch.float64).mean(0).tolist(), strict=True))

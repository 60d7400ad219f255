"""The mean IoU of the label-scarce tables (DatasetDDPM, arXiv 2112.03126)."""

from collections.abc import Sequence

import torch
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from torch import Tensor

from .common import check_results


def areas(prediction: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Intersection and union of every class in one picture.

    Pixels with an ignored truth (255) are counted: they belong to the union of the predicted class.

    Args:
        prediction: class indices, any integer type.
        truth: labels of the same shape.
        num_classes: n.

    Returns:
        Numbers of pixels with shape (2, n), int64: intersection, union.
    """
    predicted, true, both = (
        torch.bincount(labels[labels < num_classes].flatten().long(), minlength=num_classes)
        for labels in (prediction, truth, prediction[prediction == truth])
    )
    return torch.stack([both, predicted + true - both])


def class_iou(totals: Tensor) -> Tensor:
    """IoU of every class over a data set; 0 for a class that is neither predicted nor true anywhere.

    Args:
        totals: sums of `areas` over the pictures, shape (2, n).

    Returns:
        Shape (n,), float64, in [0, 1].
    """
    intersection, union = totals.double()
    return intersection / union.clamp(min=1)


@METRICS.register_module()
class ScarceIoUMetric(IoUMetric):
    """Mean IoU of the label-scarce tables, `scarce/mIoU` in percent, in addition to the results of `IoUMetric`.

    It differs from mmseg's in that an absent class counts as 0 instead of being left out, and that predictions on
    pixels of ignored truth count as wrong. The data set's `ignore_label`, if it is a class, is excluded from the mean.

    Args:
        **kwargs: see `IoUMetric`.
    """

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Store the areas of the pictures in a batch."""
        num_classes = len(self.dataset_meta['classes'])
        for sample in data_samples:
            super().process(data_batch, [sample])
            if not self.format_only:
                prediction, truth = (sample[key]['data'].squeeze(0).cpu() for key in ('pred_sem_seg', 'gt_sem_seg'))
                self.results[-1] = (*self.results[-1], areas(prediction, truth, num_classes))

    def compute_metrics(self, results: list[tuple[Tensor, ...]]) -> dict[str, float]:
        """Results of `IoUMetric`, and the mean over classes."""
        if not self.format_only:
            check_results(results, 'picture')
        metrics = super().compute_metrics([areas_of_mmseg for *areas_of_mmseg, _ in results])
        if self.format_only:
            return metrics
        iou = class_iou(torch.stack([result[-1] for result in results]).sum(dim=0))
        scored = torch.arange(len(iou)) != self.dataset_meta.get('ignore_label', 255)
        return {**metrics, 'scarce/mIoU': 100 * iou[scored].mean().item()}

"""Mean IoU of segmentors that get the names of classes, with their protocol."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from torch import Tensor

from .common import check_results
from .pck import versions, write_result


@METRICS.register_module()
class TextMaskIoUMetric(IoUMetric):
    """`IoUMetric` that writes its figures with the protocol of the model, such as a `TextMaskSegmentor`.

    Args:
        out_file: JSON file to write; with `ResultFileHook`, a relative path is in the work dir. It holds the `protocol`
            (number of images, the model's input, versions), the `figures` and the `iou` of each class in percent,
            None for one that is neither predicted nor true anywhere.
        **kwargs: see `IoUMetric`.

    Raises:
        ValueError: while testing, if the model has other classes than the data set, or no protocol.
    """

    def __init__(self, out_file: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.out_file = out_file
        self._model: dict[str, Any] = {}

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Store the areas of each image, and the protocol of the model."""
        for sample in data_samples:
            self._model = sample.get('protocol', {})
            names, classes = self._model.get('classes'), list(self.dataset_meta['classes'])
            if names is None:
                raise ValueError(
                    'predictions of the model have no protocol with its classes; TextMaskIoUMetric is for '
                    'TextMaskSegmentor, IoUMetric for others'
                )
            if list(names) != classes:
                raise ValueError(
                    f'the model has {len(names)} classes ({_listed(names)}), but the data set has {len(classes)} '
                    f'({_listed(classes)}); give the segmentor the classes of the data set, in its order'
                )
        super().process(data_batch, data_samples)

    def compute_metrics(self, results: list[tuple[Tensor, ...]]) -> dict[str, float]:
        """Figures of `IoUMetric`, which are written with the protocol."""
        if not self.format_only:
            check_results(results, 'picture')
        figures = super().compute_metrics(results)
        if self.out_file is not None and not self.format_only:
            intersection, union = (torch.stack([result[i] for result in results]).sum(0) for i in (0, 1))
            iou = [
                round(100 * both / either, 2) if either else None
                for both, either in zip(intersection.tolist(), union.tolist(), strict=True)
            ]
            content = {
                'protocol': {'images': len(results), **self._model, 'versions': versions()},
                'figures': {name: float(value) for name, value in figures.items()},
                'iou': dict(zip(self.dataset_meta['classes'], iou, strict=True)),
            }
            write_result(self.out_file, content)
        return figures


def _listed(names: Sequence[str]) -> str:
    return ', '.join(names) if len(names) < 5 else f'{", ".join(names[:3])}, ..., {names[-1]}'

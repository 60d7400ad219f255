"""Visualizer for predictions whose size differs from that of the image."""

from typing import Any

import mmcv
import numpy as np
from mmseg.registry import VISUALIZERS
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer


@VISUALIZERS.register_module()
class LabelSizeVisualizer(SegLocalVisualizer):
    """mmseg's visualizer, which resizes the image to the label maps that it draws over it.

    Where the test pipeline has `LoadLabelArray(size=...)`, labels and predictions have that size, not that of the
    image.

    Args:
        **kwargs: see `SegLocalVisualizer`.
    """

    def add_datasample(
        self, name: str, image: np.ndarray, data_sample: SegDataSample | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Draw one image.

        Args:
            name: of the image.
            image: RGB, uint8, with shape (H, W, 3).
            data_sample: `pred_sem_seg`, and `gt_sem_seg` if available, with shapes (1, h, w).
            *args: see `SegLocalVisualizer.add_datasample`.
            **kwargs: see `SegLocalVisualizer.add_datasample`.
        """
        if data_sample is not None and 'pred_sem_seg' in data_sample:
            height, width = data_sample.pred_sem_seg.shape
            image = mmcv.imresize(image, (width, height), interpolation='area')
        super().add_datasample(name, image, data_sample, *args, **kwargs)

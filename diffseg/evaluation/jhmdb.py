"""PCK of propagated joints as UVC and Contrastive Random Walk report it for JHMDB."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmseg.registry import METRICS

from diffseg.structures import to_array

from .common import check_results

BOX_FRACTION = 0.6


def joint_distances(joints: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Distances from the true joints relative to the size of the person, in every frame but the first.

    The size is 0.6 times the diagonal of the bounding box of a frame's true joints; as in the published code, only of
    those that are predicted.

    Args:
        joints: true (x, y) in pixels, with shape (T, J, 2).
        predicted: (x, y) in pixels with shape (T, J, 2); negative x where a joint is not predicted.

    Returns:
        float64 with shape (T - 1, J), NaN where a joint is not predicted, infinite where the box has no extent.

    Raises:
        ValueError: the shapes differ.
    """
    if joints.shape != predicted.shape:
        raise ValueError(
            f'joints have shape {joints.shape} and predictions {predicted.shape}; both must be (frames, joints, 2)'
        )
    predicted_mask = predicted[1:, :, 0] >= 0  # (T - 1, J)
    truth, guess = joints[1:].astype(np.float64), predicted[1:].astype(np.float64)
    low = np.where(predicted_mask[..., None], truth, np.inf).min(axis=1)  # (T - 1, 2)
    high = np.where(predicted_mask[..., None], truth, -np.inf).max(axis=1)
    extent = BOX_FRACTION * np.linalg.norm(high - low, axis=-1, keepdims=True)  # (T - 1, 1)
    distances = np.linalg.norm(guess - truth, axis=-1)
    return np.divide(
        distances, extent, out=np.where(predicted_mask, np.inf, np.nan), where=predicted_mask & (extent > 0)
    )


def joint_pck(distances: np.ndarray, threshold: float) -> float:
    """PCK in per cent: the mean over joints of the share of frames in which a joint is within `threshold`.

    Frames in which a joint is not predicted are ignored for this joint, as in the published code; a joint that is never
    predicted, which is a division by zero there, counts as 0.

    Args:
        distances: relative, with shape (frames, J), NaN where a joint is not predicted.
        threshold: largest relative distance of a correct joint.
    """
    counted = (~np.isnan(distances)).sum(axis=0)
    correct = (distances <= threshold).sum(axis=0)
    return 100 * float(np.mean(correct / np.maximum(counted, 1)))


@METRICS.register_module()
class JHMDBMetric(BaseMetric):
    """PCK over all videos' frames but the first, and the share of joints that are not predicted, in per cent.

    Args:
        thresholds: fractions of the person's size.
        **kwargs: see `BaseMetric`.
    """

    def __init__(self, thresholds: Sequence[float] = (0.1, 0.2), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.thresholds = tuple(thresholds)

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Store the distances of each video.

        Raises:
            ValueError: joints and predictions of a video differ in shape.
        """
        for sample in data_samples:
            try:
                distances = joint_distances(to_array(sample['joints']), to_array(sample['pred_joints']))
            except ValueError as error:
                raise ValueError(f'video {sample["video_id"]}: {error}') from error
            self.results.append(distances)

    def compute_metrics(self, results: list[np.ndarray]) -> dict[str, float]:
        """Score all videos' joints together."""
        check_results(results, 'video')
        distances = np.concatenate(results)
        figures = {f'PCK@{threshold:g}': joint_pck(distances, threshold) for threshold in self.thresholds}
        missed = 100 * float(np.isnan(distances).mean())
        print_log(f'{len(results)} videos, {missed:.2f} % of joints not predicted (they do not count)', 'current')
        return {**figures, 'missed': missed}

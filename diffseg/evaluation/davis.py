"""DAVIS's measures of video object segmentation: pure functions, and the metric that prints the official table.

Region similarity J is the intersection over union of an object's masks, boundary accuracy F the F-measure of their
boundaries (Perazzi et al., CVPR 2016); J&F is the mean of both. Each is summarised over an object's frames, without the
first one, whose masks are the input, and the last one, by mean, recall (share of frames above 0.5) and decay (mean of
the first quarter of the frames less that of the last), and these are averaged over the objects of all videos.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmseg.registry import METRICS
from prettytable import PrettyTable

from diffseg.masks import VOID, read_mask
from diffseg.structures import to_array

from .common import check_results

TOLERANCE = 0.008  # of the image's diagonal
STATISTICS = ('Mean', 'Recall', 'Decay')


def region_similarity(annotation: np.ndarray, predicted: np.ndarray, void: np.ndarray | None = None) -> float:
    """J of one object in one frame, in [0, 1]; 1 where both masks are empty.

    Args:
        annotation: whether a pixel belongs to the object, bool with shape (H, W).
        predicted: predicted mask, bool with shape (H, W).
        void: pixels that do not count, bool with shape (H, W).
    """
    annotation, predicted = _without_void(annotation, predicted, void)
    union = np.count_nonzero(annotation | predicted)
    return np.count_nonzero(annotation & predicted) / union if union else 1.0


def boundary_accuracy(annotation: np.ndarray, predicted: np.ndarray, void: np.ndarray | None = None) -> float:
    """F of one object in one frame, in [0, 1]; 1 where both masks have no boundary.

    A boundary pixel is matched within 0.8 % of the image's diagonal, rounded up to whole pixels, of the other boundary.

    Args:
        annotation: whether a pixel belongs to the object, bool with shape (H, W).
        predicted: predicted mask, bool with shape (H, W).
        void: pixels that do not count, bool with shape (H, W).
    """
    truth, guess = (boundary(mask) for mask in _without_void(annotation, predicted, void))
    if not truth.any() or not guess.any():
        return float(truth.any() == guess.any())
    radius = math.ceil(TOLERANCE * math.hypot(*annotation.shape))
    span = np.arange(-radius, radius + 1) ** 2
    disk = (np.add.outer(span, span) <= radius**2).astype(np.uint8)
    near_truth, near_guess = (cv2.dilate(edges.astype(np.uint8), disk) > 0 for edges in (truth, guess))
    precision, recall = near_truth[guess].mean(), near_guess[truth].mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one on their right, below, or diagonally below, bool with shape (H, W).

    The border of the image is no boundary.
    """
    mask = mask.astype(bool)
    after = np.pad(mask, ((0, 1), (0, 1)), mode='edge')
    return (mask != after[:-1, 1:]) | (mask != after[1:, :-1]) | (mask != after[1:, 1:])


def _without_void(annotation: np.ndarray, predicted: np.ndarray, void: np.ndarray | None) -> list[np.ndarray]:
    if annotation.shape != predicted.shape:
        raise ValueError(
            f'the annotation has shape {annotation.shape} and the prediction {predicted.shape}; predict masks at the '
            f"frames' original size"
        )
    return [mask.astype(bool) if void is None else mask.astype(bool) & ~void for mask in (annotation, predicted)]


def score_video(annotations: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """J and F of every object in every frame but the first and the last.

    Objects are those of the first annotation, 1 to its highest id; one that is not predicted is an empty mask. Unlike
    davis2017-evaluation, which treats void pixels as background, they are ignored, as its measures allow; the official
    annotations have none.

    Args:
        annotations: object ids with shape (T, H, W), uint8, 255 where a pixel does not count.
        predicted: predicted object ids with the same shape; the first frame is the annotated one.

    Returns:
        J and F in [0, 1] with shape (2, objects, T - 2).

    Raises:
        ValueError: shapes differ, there are fewer than three frames or no objects, or a predicted id is not in the
            first frame.
    """
    if annotations.shape != predicted.shape:
        raise ValueError(
            f'annotations have shape {annotations.shape} and predictions {predicted.shape}; predict a mask for every '
            f"frame, at the frames' original size"
        )
    if len(annotations) < 3:
        raise ValueError(
            f'the video has {len(annotations)} frames; the first and the last are not scored, so it needs 3'
        )
    first = annotations[0]
    objects = int(first[first != VOID].max(initial=0))
    if not objects:
        raise ValueError('the first annotation has no object; objects have the values 1, 2, ...')
    if (highest := int(predicted[1:-1].max())) > objects:
        raise ValueError(f'object {highest} is predicted, the first frame has objects 1 to {objects}')
    figures = np.empty((2, objects, len(annotations) - 2))
    for t, (truth, guess) in enumerate(zip(annotations[1:-1], predicted[1:-1], strict=True)):
        void = truth == VOID
        for k in range(objects):
            masks = truth == k + 1, guess == k + 1
            figures[:, k, t] = region_similarity(*masks, void), boundary_accuracy(*masks, void)
    return figures


def statistics(values: np.ndarray) -> np.ndarray:
    """Mean, recall and decay of one object's J or F over frames, with shape (3,).

    Args:
        values: J or F in [0, 1] with shape (frames,).
    """
    # the quarters' ends are rounded, halves up, and shared by neighbouring quarters
    ends = np.floor(np.linspace(0, len(values) - 1, 5) + 0.5 + 1e-9).astype(int)
    first, last = values[: ends[1] + 1], values[ends[3] :]
    return np.array([values.mean(), (values > 0.5).mean(), first.mean() - last.mean()])


@METRICS.register_module()
class DAVISMetric(BaseMetric):
    """J&F, and mean, recall and decay of J and F, in per cent, over the objects of all videos.

    Args:
        out_file: CSV file to write, a row for each object, named "VIDEO_NUMBER" as in the official tool; with
            `ResultFileHook`, a relative path is in the work dir.
        **kwargs: see `BaseMetric`.
    """

    def __init__(self, out_file: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.out_file = out_file

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Read the annotations of each video and score it.

        Raises:
            ValueError: a video cannot be scored; the message names it or its annotation.
        """
        for sample in data_samples:
            annotations = [read_mask(path, sample['ori_shape']) for path in sample['annotation_paths']]
            try:
                figures = score_video(np.stack(annotations), to_array(sample['pred_masks']))
            except ValueError as error:
                raise ValueError(f'video {sample["video_id"]}: {error}') from error
            rows = [[statistics(measure).tolist() for measure in values] for values in figures.transpose(1, 0, 2)]
            self.results.append((sample['video_id'], rows))  # J's and F's statistics of each object

    def compute_metrics(self, results: list[tuple[str, list[list[list[float]]]]]) -> dict[str, float]:
        """Average over objects, write the rows and log the table."""
        check_results(results, 'video')
        columns = [f'{measure}-{statistic}' for measure in 'JF' for statistic in STATISTICS]
        rows = {
            f'{video}_{number}': dict(zip(columns, (100 * np.ravel(values)).tolist(), strict=True))
            for video, objects in results
            for number, values in enumerate(objects, start=1)
        }
        figures = {column: float(np.mean([row[column] for row in rows.values()])) for column in columns}
        figures = {'J&F-Mean': (figures['J-Mean'] + figures['F-Mean']) / 2, **figures}
        table = PrettyTable(list(figures))
        table.add_row([f'{value:.2f}' for value in figures.values()])
        print_log(
            f'\n{table.get_string()}\nin per cent, means over {len(rows)} objects of {len(results)} videos',
            logger='current',
        )
        if self.out_file is not None:
            path = Path(self.out_file)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open('w', newline='') as file:
                writer = csv.writer(file, lineterminator='\n')
                writer.writerow(['Sequence', *columns])
                writer.writerows([name, *(f'{value:.3f}' for value in row.values())] for name, row in rows.items())
        return figures

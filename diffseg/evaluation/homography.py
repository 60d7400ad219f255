"""Homographies from matches: pure functions, and the metric of HPatches in DIFT (arXiv 2306.03881).

An estimated homography is correct within a number of pixels if the mean distance between the corners of the source
under it and under the true one is at most this number. It is estimated from at least four matches; where that fails it
counts as wrong.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import cv2
import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmseg.registry import METRICS
from prettytable import PrettyTable

from diffseg.structures import to_array

from .common import check_results
from .pck import versions, write_result

THRESHOLDS = (1, 3, 5)
METHODS = {'ransac': cv2.RANSAC, 'lmeds': cv2.LMEDS, 'magsac': cv2.USAC_MAGSAC}
GROUPS = {'all': '', 'illumination': 'i_', 'viewpoint': 'v_'}  # prefixes of the names of sequences

Method = Literal['ransac', 'lmeds', 'magsac']


def estimate_homography(
    source: np.ndarray, target: np.ndarray, method: Method = 'ransac', threshold: float = 3
) -> tuple[np.ndarray | None, np.ndarray]:
    """Estimate the homography between two images from matched points with outliers.

    Args:
        source: (x, y) in pixels with shape (P, 2).
        target: the matched (x, y) with shape (P, 2).
        method: OpenCV's RANSAC, LMedS (least median of squares) or MAGSAC++; equal points give equal results.
        threshold: largest error of an inlier, in pixels; without effect on 'lmeds'.

    Returns:
        The homography with shape (3, 3), None if there are fewer than four points or they are degenerate; and a mask of
        the inliers, bool with shape (P,).

    Raises:
        ValueError: another method, or the numbers of points differ.
    """
    if method not in METHODS:
        raise ValueError(f'method is {method!r}, choose from {", ".join(METHODS)}')
    if source.shape != target.shape:
        raise ValueError(f'source has shape {source.shape} and target {target.shape}; both must be (P, 2)')
    nothing = None, np.zeros(len(source), bool)
    if len(source) < 4:
        return nothing
    try:
        homography, inliers = cv2.findHomography(source, target, METHODS[method], threshold)
    except cv2.error:  # raised by MAGSAC++ on degenerate points
        return nothing
    if homography is None or not np.isfinite(homography).all():
        return nothing
    return homography, inliers[:, 0].astype(bool)


def corner_error(estimated: np.ndarray, truth: np.ndarray, size: tuple[int, int]) -> float:
    """Mean distance, in pixels of the target, between the corners of the source under two homographies.

    Args:
        estimated: with shape (3, 3).
        truth: with shape (3, 3).
        size: height and width of the source; the corners are the centres of its corner pixels.
    """
    corners = image_corners(size)
    return float(np.linalg.norm(transform(estimated, corners) - transform(truth, corners), axis=1).mean())


def image_corners(size: tuple[int, int]) -> np.ndarray:
    """Centres of the corner pixels of an image of (height, width), clockwise from the upper left, with shape (4, 2)."""
    bottom, right = size[0] - 1, size[1] - 1
    return np.array([[0, 0], [right, 0], [right, bottom], [0, bottom]], float)


def transform(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply a homography (3, 3) to points with shape (N, 2)."""
    return cv2.perspectiveTransform(np.asarray(points, float)[None], homography)[0]


def make_record(sample: Mapping[str, Any], method: Method, threshold: float) -> dict[str, Any]:
    """The record of one pair, ready for JSON.

    Args:
        sample: fields and meta information of a `HomographySample` with predictions.
        method: see `estimate_homography`.
        threshold: see `estimate_homography`.

    Returns:
        `pair_id`, `sequence`, numbers of `keypoints` (of both images), `matches` and `inliers`, the `homography` and
        its corner `error` in pixels, both None without an estimate, and the (height, width) of both images as `loaded`.
    """
    rows = to_array(sample['pred_matches'])
    source, target = (to_array(sample[f'keypoints{view}'])[rows[:, view]] for view in (0, 1))
    homography, inliers = estimate_homography(source, target, method, threshold)
    error = math.inf
    if homography is not None:
        error = corner_error(homography, to_array(sample['homography']), sample['ori_shape0'])
    return {
        'pair_id': sample['pair_id'],
        'sequence': sample['sequence'],
        'keypoints': [len(sample['keypoints0']), len(sample['keypoints1'])],
        'matches': len(rows),
        'inliers': int(inliers.sum()),
        'homography': None if homography is None else homography.tolist(),
        'error': error if math.isfinite(error) else None,
        'loaded': [list(sample[f'img_shape{view}']) for view in (0, 1)],
    }


def figure_name(threshold: float, group: str) -> str:
    """For example `accuracy@3px/viewpoint`."""
    return f'accuracy@{threshold:g}px/{group}'


def score(records: Iterable[Mapping[str, Any]], thresholds: Sequence[float] = THRESHOLDS) -> dict[str, float]:
    """Percentage of correct homographies, for all groups that have pairs.

    Args:
        records: of all pairs, see `make_record`.
        thresholds: in pixels.

    Returns:
        Figures by name, and for each group the mean number of matches, `matches/all`, and the number of pairs without a
        homography, `failures/all`.
    """
    records = list(records)
    figures = {}
    for group, beginning in GROUPS.items():
        chosen = [record for record in records if record['sequence'].startswith(beginning)]
        if not chosen:
            continue
        errors = np.array([math.inf if record['error'] is None else record['error'] for record in chosen])
        for threshold in thresholds:
            figures[figure_name(threshold, group)] = 100 * int((errors <= threshold).sum()) / len(errors)
        figures[f'matches/{group}'] = float(np.mean([record['matches'] for record in chosen]))
        figures[f'failures/{group}'] = int(np.isinf(errors).sum())
    return figures


@METRICS.register_module()
class HomographyMetric(BaseMetric):
    """Accuracy of homographies estimated from matches, for all pairs, and separately for illumination and viewpoint.

    Args:
        method: see `estimate_homography`.
        threshold: see `estimate_homography`.
        thresholds: of the corner error, in pixels.
        out_file: JSON file to write, with the protocol, the figures and a record of each pair; with `ResultFileHook`, a
            relative path is in the work dir.
        **kwargs: see `BaseMetric`.

    Raises:
        ValueError: another method.
    """

    def __init__(
        self,
        method: Method = 'ransac',
        threshold: float = 3,
        thresholds: Sequence[float] = THRESHOLDS,
        out_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if method not in METHODS:
            raise ValueError(f'method is {method!r}, choose from {", ".join(METHODS)}')
        self.method = method
        self.threshold = threshold
        self.thresholds = tuple(thresholds)
        self.out_file = out_file
        self._setting: dict[str, Any] = {}

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Store the record of each pair, and the protocol of the model."""
        for sample in data_samples:
            self._setting = {'keypoints': sample['keypoint_source'], **sample.get('protocol', {})}
            self.results.append(make_record(sample, self.method, self.threshold))

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Score the records of all pairs, write the result and log the table."""
        check_results(results, 'pair')
        figures = score(results, self.thresholds)
        columns = [f'@{threshold:g} px' for threshold in self.thresholds]
        table = PrettyTable(['accuracy', *columns, 'matches', 'failures'], align='r')
        for group in GROUPS:
            names = [figure_name(threshold, group) for threshold in self.thresholds]
            if names[0] in figures:
                cells = [f'{figures[name]:.2f}' for name in names]
                table.add_row([group, *cells, f'{figures[f"matches/{group}"]:.1f}', figures[f'failures/{group}']])
        print_log(f'\n{table.get_string()}\n{len(results)} pairs', logger='current')
        if self.out_file is not None:
            data = self.dataset_meta or {}
            loaded = [shape for record in results for shape in record['loaded']]
            protocol = {
                **{key: data.get(key) for key in ('dataset', 'num_sequences')},
                'pairs': len(results),
                'loaded_size': loaded[0] if all(shape == loaded[0] for shape in loaded) else 'varies',
                **self._setting,
                'method': self.method,
                'threshold': self.threshold,
                'versions': versions() | {'cv2': cv2.__version__},
            }
            content = {'protocol': protocol, 'figures': figures, 'pairs': results}
            write_result(self.out_file, content)
        return figures

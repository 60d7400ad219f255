"""Percentage of correct keypoints (PCK): pure functions, and the metric, whose result includes the protocol.

A figure is named by threshold, base and mean, `PCK@0.1-bbox/point`:

* a keypoint is correct within `threshold * extent`, where
* the base is the longer side of the target's box ('bbox') or of the target image ('img'), in original pixels;
* the mean is over all keypoints ('point': Diffusion Hyperfeatures, later papers), over the percentages of pairs
  ('image': DIFT's 52.9 on SPair-71k), or over the percentages of keypoints by category ('category').

With a confidence of every match, `PCK@0.1-bbox/coverage0.5` is over the most confident half of the keypoints, and
`PCK@0.1-bbox/coverage-area` the mean over all numbers of most confident keypoints: the area under the curve of accuracy
over coverage.

Figures of predictions with pose alignment are apart: `PCK@0.1-bbox/point+aligned`.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import diffusers
import mmengine
import mmseg
import torch
import transformers
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmseg.registry import METRICS
from prettytable import PrettyTable
from torch import Tensor

from diffseg import __version__
from diffseg.files import whole_file

from .common import check_results

THRESHOLDS = (0.01, 0.05, 0.1, 0.15)
BASES = ('bbox', 'img')
COVERAGES = (0.25, 0.5, 0.75)
ALIGNED = '+aligned'  # behind the names of figures with pose alignment
PER_KEYPOINT = ('predicted', 'target', 'cycle_error', 'aligned', 'keypoint_ids')  # lists in a record
PACKAGES = (diffusers, mmengine, mmseg, torch, transformers)

Base = Literal['bbox', 'img']
Mean = Literal['point', 'image', 'category']
Record = Mapping[str, Any]  # of one pair, see `make_record`


def correct_keypoints(predicted: Tensor, target: Tensor, extent: float, alpha: float = 0.1) -> Tensor:
    """Mask of the predictions that are at most `alpha * extent` away from the target.

    Args:
        predicted: (x, y) in pixels, with shape (N, 2).
        target: (x, y) in pixels, with shape (N, 2).
        extent: in pixels; the longer side of the target's box for PCK-bbox, of the target image for PCK-img.
        alpha: tolerance as a fraction of `extent`.

    Returns:
        bool with shape (N,).

    Raises:
        ValueError: the shapes differ or `extent` is not positive.
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f'predicted has shape {tuple(predicted.shape)} and target {tuple(target.shape)}; both must be (N, 2)'
        )
    if extent <= 0:
        raise ValueError(f'extent is {extent}; the box or image of the target must have a positive size in pixels')
    return torch.linalg.vector_norm(predicted.double() - target.double(), dim=-1) <= alpha * extent


def pck(correct: Sequence[Tensor], mean: Mean, categories: Sequence[str] | None = None) -> float:
    """PCK in percent over pairs; those without keypoints do not count.

    Args:
        correct: masks of the correct keypoints of each pair, bool with shape (N_pair,).
        mean: 'point', 'image' or 'category', see above.
        categories: of the pairs, for 'category'.

    Raises:
        ValueError: there is no keypoint, `mean` is unknown, or `categories` are missing.
    """
    pairs = [mask.double() for mask in correct if len(mask)]
    if not pairs:
        raise ValueError('there is no keypoint to score')
    if mean == 'point':
        return 100 * float(torch.cat(pairs).mean())
    if mean == 'image':
        return 100 * float(torch.stack([mask.mean() for mask in pairs]).mean())
    if mean != 'category':
        raise ValueError(f"mean is {mean!r}, choose 'point', 'image' or 'category'")
    if categories is None or len(categories) != len(correct):
        raise ValueError("mean='category' needs the category of each pair")
    groups: dict[str, list[Tensor]] = {}
    for category, mask in zip(categories, correct, strict=True):
        if len(mask):
            groups.setdefault(category, []).append(mask)
    return sum(pck(group, 'point') for group in groups.values()) / len(groups)


def accuracy_over_coverage(correct: Tensor, errors: Tensor) -> Tensor:
    """Percentage of correct keypoints among the k most confident ones, for every k.

    Of keypoints with equal errors any may come first: their expected value is taken, so that the order of the keypoints
    does not matter.

    Args:
        correct: bool with shape (N,).
        errors: cycle errors, or another measure that is low for confident matches, with shape (N,).

    Returns:
        Percentages for k = 1 to N, float64 with shape (N,).

    Raises:
        ValueError: there is no keypoint, or the shapes differ.
    """
    if correct.shape != errors.shape or not len(correct):
        raise ValueError(f'correct has shape {tuple(correct.shape)} and errors {tuple(errors.shape)}, expected (N,)')
    _, groups, sizes = errors.unique(return_inverse=True, return_counts=True)  # in ascending order
    right = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, groups, correct.double())
    expected = (right / sizes).repeat_interleave(sizes)  # probability that the k-th keypoint is correct
    return 100 * expected.cumsum(0) / torch.arange(1, len(errors) + 1)


def make_record(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The record of one pair, ready for JSON.

    Args:
        sample: fields and meta information of a `PairSample` with predictions.

    Returns:
        `pair_id` and `category`, and either `damaged` or, all in original pixels, `predicted` and `target` keypoints
        (N, 2), those visible in both images; the target's `bbox`, (x1, y1, x2, y2); the target image's `size`, (height,
        width); the (height, width) of both images as `loaded`, None if that is the original size and "varies" if they
        differ; and the pair's `variations`. If the sample has cycle errors, `cycle_error` has them as fractions of the
        longer side of the source image; if it has predictions with pose alignment, `aligned` has them, (N, 2); if it
        has the ids of the keypoints, `keypoint_ids` has those of the visible ones.
    """
    record = {'pair_id': sample['pair_id'], 'category': sample['category']}
    if 'damaged' in sample:
        return record | {'damaged': sample['damaged']}
    loaded, original = ([tuple(sample[f'{kind}_shape{view}']) for view in (0, 1)] for kind in ('img', 'ori'))
    if 'cycle_error' in sample:
        record['cycle_error'] = (sample['cycle_error'].double() / max(sample['ori_shape0'])).tolist()
    if 'keypoint_ids' in sample:
        record['keypoint_ids'] = sample['keypoint_ids'][sample['visible']].tolist()
    if 'pred_keypoints1_aligned' in sample:
        record['aligned'] = sample['pred_keypoints1_aligned'].tolist()
    return record | {
        'predicted': sample['pred_keypoints1'].tolist(),
        'target': sample['keypoints1'][sample['visible']].tolist(),
        'bbox': sample['bbox1'].tolist(),
        'size': list(sample['ori_shape1']),
        'loaded': None if loaded == original else list(loaded[0]) if loaded[0] == loaded[1] else 'varies',
        'variations': dict(sample.get('variations', {})),
    }


def select_keypoints(record: Record, keypoint_ids: Collection[int]) -> Record:
    """A record with some of its keypoints only, by their ids.

    Raises:
        ValueError: the record has no ids.
    """
    if 'damaged' in record:
        return record
    if 'keypoint_ids' not in record:
        raise ValueError(f'pair {record["pair_id"]} does not say which keypoints it has, so that none can be selected')
    rows = [row for row, name in enumerate(record['keypoint_ids']) if name in keypoint_ids]
    lists = {name: record[name] for name in PER_KEYPOINT if name in record}
    return {**record, **{name: [values[row] for row in rows] for name, values in lists.items()}}


def figure_name(threshold: float, base: Base, mean: Mean) -> str:
    """For example `PCK@0.1-bbox/point`."""
    return f'PCK@{threshold:g}-{base}/{mean}'


def coverage_name(threshold: float, base: Base, coverage: float | None) -> str:
    """For example `PCK@0.1-bbox/coverage0.5`; `PCK@0.1-bbox/coverage-area` if `coverage` is None."""
    return f'PCK@{threshold:g}-{base}/coverage{"-area" if coverage is None else f"{coverage:g}"}'


def score(
    records: Iterable[Record],
    thresholds: Sequence[float] = THRESHOLDS,
    bases: Sequence[Base] = BASES,
    coverages: Sequence[float] | None = None,
) -> dict[str, dict[str, float]]:
    """PCK for all thresholds, bases and means.

    Args:
        records: of all pairs, see `make_record`; damaged ones do not count.
        thresholds: fractions of the extent.
        bases: what the extent is.
        coverages: fractions of the keypoints, the most confident ones by their cycle errors, for which there are
            figures as well; None without confidences.

    Returns:
        Under 'all' the figures of all pairs with all three means, and under each category, sorted by name, those of its
        pairs with the means over points and images; with `coverages` also those of `coverage_name`; and if all records
        have predictions with pose alignment, those of these, their names followed by `ALIGNED`; in percent.

    Raises:
        ValueError: no pair has a keypoint, or a record has no cycle errors although there are coverages.
    """
    pairs = [record for record in records if record.get('predicted')]
    categories = [record['category'] for record in pairs]
    figures: dict[str, dict[str, float]] = {name: {} for name in ('all', *sorted(set(categories)))}
    for threshold in thresholds:
        for base in bases:
            correct = [_correct(record, threshold, base) for record in pairs]
            for group, group_figures in figures.items():
                chosen = [c for c, category in zip(correct, categories, strict=True) if group in ('all', category)]
                for mean in ('point', 'image'):
                    group_figures[figure_name(threshold, base, mean)] = pck(chosen, mean)
                if coverages is not None:
                    errors = [_errors(r) for r in pairs if group in ('all', r['category'])]
                    curve = accuracy_over_coverage(torch.cat(chosen), torch.cat(errors))
                    group_figures[coverage_name(threshold, base, None)] = curve.mean().item()
                    for coverage in coverages:
                        last = max(1, round(coverage * len(curve))) - 1
                        group_figures[coverage_name(threshold, base, coverage)] = curve[last].item()
            figures['all'][figure_name(threshold, base, 'category')] = pck(correct, 'category', categories)
    if all('aligned' in record for record in pairs):
        aligned = [{**record, 'predicted': record['aligned']} for record in pairs]
        for record in aligned:
            del record['aligned']
        for group, scores in score(aligned, thresholds, bases).items():
            figures[group] |= {f'{name}{ALIGNED}': value for name, value in scores.items()}
    return figures


def aligned_figures(figures: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]] | None:
    """Those of the figures of `score` that are with pose alignment, under their plain names; None if there are none."""
    aligned = {
        group: {name.removesuffix(ALIGNED): value for name, value in scores.items() if name.endswith(ALIGNED)}
        for group, scores in figures.items()
    }
    return aligned if aligned['all'] else None


def _errors(record: Record) -> Tensor:
    if 'cycle_error' not in record:
        raise ValueError(
            f'pair {record["pair_id"]} has no cycle errors, by which matches are ranked; set cycle_error=True in the '
            f'model, and test again'
        )
    return torch.tensor(record['cycle_error'], dtype=torch.float64)


def _correct(record: Record, threshold: float, base: Base) -> Tensor:
    if base not in BASES:
        raise ValueError(f'base is {base!r}, choose from {", ".join(BASES)}')
    x1, y1, x2, y2 = record['bbox']
    extent = max(x2 - x1, y2 - y1) if base == 'bbox' else max(record['size'])
    predicted, target = (torch.tensor(record[key], dtype=torch.float64) for key in ('predicted', 'target'))
    return correct_keypoints(predicted, target, extent, threshold)


def format_table(
    figures: Mapping[str, Mapping[str, float]],
    thresholds: Sequence[float] = THRESHOLDS,
    bases: Sequence[Base] = BASES,
) -> str:
    """Format the result of `score` as a text table: a row for each category, all pairs, and mean of the categories.

    Each cell has the means over points and over images.
    """
    columns = [(threshold, base) for base in bases for threshold in thresholds]
    table = PrettyTable(['PCK /point /image', *(f'@{threshold:g}-{base}' for threshold, base in columns)], align='r')
    table.align['PCK /point /image'] = 'l'
    names = [[figure_name(*column, mean) for mean in ('point', 'image')] for column in columns]
    categories = [name for name in figures if name != 'all']

    def add(label: str, groups: Sequence[str], divider: bool = False) -> None:
        means = [[sum(figures[group][name] for group in groups) / len(groups) for name in both] for both in names]
        table.add_row([label, *(f'{point:.2f} {image:.2f}' for point, image in means)], divider=divider)

    for category in categories:
        add(category, [category], divider=category == categories[-1])
    add('all pairs', ['all'])
    add('mean of categories', categories)
    return table.get_string()


def format_coverage_table(
    figures: Mapping[str, Mapping[str, float]],
    coverages: Sequence[float],
    thresholds: Sequence[float] = THRESHOLDS,
    bases: Sequence[Base] = BASES,
) -> str:
    """Format the curve of accuracy over coverage of all pairs as a text table, a row for each threshold and base."""
    table = PrettyTable(['accuracy over coverage', *(f'{coverage:.0%}' for coverage in coverages), '100%', 'area'])
    table.align = 'r'
    table.align['accuracy over coverage'] = 'l'
    for base in bases:
        for threshold in thresholds:
            names = [coverage_name(threshold, base, coverage) for coverage in (*coverages, None)]
            names.insert(-1, figure_name(threshold, base, 'point'))
            table.add_row([f'PCK@{threshold:g}-{base}', *(f'{figures["all"][name]:.2f}' for name in names)])
    return table.get_string()


@METRICS.register_module()
class PCKMetric(BaseMetric):
    """PCK with all thresholds, bases and means, see above.

    Returns the figures of all pairs by name, and the number of damaged pairs; the log has a table with a row for each
    category.

    Args:
        thresholds: fractions of the extent.
        bases: what the extent is, 'bbox' and 'img'.
        out_file: JSON file to write; with `ResultFileHook`, a relative path is in the work dir. It holds the
            `protocol`: data set, split, number of pairs, resizing, protocol of the model, versions; the `figures`; and
            the `predictions`, one record for each pair, from which `tools/analysis/rescore.py` recomputes the figures
            without the model.
        categories: `fnmatch` patterns; pairs of other categories are ignored. By default all count.
        keypoint_ids: score these keypoints only, by their ids in the annotations, such as those that were not trained
            on. By default all count.
        allow_selection_on_test: allow to select checkpoints by figures on the test split, as for some published
            figures; it is recorded in the protocol. See `SelectionGuardHook`.
        confidence: 'cycle_error' ranks the matches by the cycle errors that a `CorrespondenceModel(cycle_error=True)`
            predicts: there are figures of accuracy over coverage as well.
        coverages: of these figures, fractions of the keypoints.
        **kwargs: see `BaseMetric`.

    Raises:
        ValueError: unknown base or confidence, or a coverage that is no fraction.
    """

    def __init__(
        self,
        thresholds: Sequence[float] = THRESHOLDS,
        bases: Sequence[Base] = BASES,
        out_file: str | None = None,
        categories: Sequence[str] | None = None,
        keypoint_ids: Sequence[int] | None = None,
        allow_selection_on_test: bool = False,
        confidence: Literal['cycle_error'] | None = None,
        coverages: Sequence[float] = COVERAGES,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if unknown := set(bases) - set(BASES):
            raise ValueError(f'bases {sorted(unknown)} are unknown, choose from {", ".join(BASES)}')
        if confidence not in (None, 'cycle_error'):
            raise ValueError(f"confidence is {confidence!r}; it is 'cycle_error' or None")
        if not all(0 < coverage < 1 for coverage in coverages):
            raise ValueError(f'coverages are {tuple(coverages)}, expected numbers between 0 and 1')
        self.confidence = confidence
        self.coverages = None if confidence is None else tuple(coverages)
        self.thresholds = tuple(thresholds)
        self.bases = tuple(bases)
        self.out_file = out_file
        self.categories = None if categories is None else list(categories)
        self.keypoint_ids = None if keypoint_ids is None else list(keypoint_ids)
        self.allow_selection_on_test = allow_selection_on_test
        self._model: dict[str, Any] = {}

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Store the record of each pair, and the protocol of the model."""
        for sample in data_samples:
            self._model = sample.get('protocol', {})
            self.results.append(make_record(sample))

    def compute_metrics(self, results: list[Record]) -> dict[str, float]:
        """Score the records of all pairs, write the result and log the table."""
        if self.categories is not None:
            results = [r for r in results if any(fnmatchcase(r['category'], pattern) for pattern in self.categories)]
            if not results:
                raise ValueError(f'no pair has a category that matches {self.categories}')
        if self.keypoint_ids is not None:
            results = [select_keypoints(record, self.keypoint_ids) for record in results]
        check_results(results, 'pair')
        damaged = [record['damaged'] for record in results if 'damaged' in record]
        if len(damaged) == len(results):
            raise ValueError(f'none of the {len(results)} pairs could be evaluated; the first: {damaged[0]}')
        figures = score(results, self.thresholds, self.bases, self.coverages)
        print_log('\n' + format_table(figures, self.thresholds, self.bases), logger='current')
        if (aligned := aligned_figures(figures)) is not None:
            table = format_table(aligned, self.thresholds, self.bases)
            print_log(f'with pose alignment:\n{table}', logger='current')
        if self.coverages is not None:
            table = format_coverage_table(figures, self.coverages, self.thresholds, self.bases)
            print_log('\n' + table, logger='current')
        if damaged:
            print_log(f'{len(damaged)} of {len(results)} pairs were damaged and do not count', logger='current')
        if self.out_file is not None:
            content = {
                'protocol': self._protocol(results),
                'figures': figures,
                'damaged': sorted(set(damaged)),
                'predictions': results,
            }
            write_result(self.out_file, content)
        return {**figures['all'], 'damaged': len(damaged)}

    def _protocol(self, results: Sequence[Record]) -> dict[str, Any]:
        data = self.dataset_meta or {}
        loaded = [record['loaded'] for record in results if 'loaded' in record]
        return {
            **{key: data.get(key) for key in ('dataset', 'split', 'protocol', 'list', 'box')},
            'categories': self.categories,
            'keypoint_ids': self.keypoint_ids,
            'pairs': len(results),
            'damaged': sum('damaged' in record for record in results),
            'loaded_size': loaded[0] if all(size == loaded[0] for size in loaded) else 'varies',
            **self._model,
            'thresholds': self.thresholds,
            'bases': self.bases,
            'confidence': self.confidence,
            'coverages': self.coverages,
            'selection_on_test': self.allow_selection_on_test,
            'versions': versions(),
        }


def versions() -> dict[str, str]:
    """Versions of the packages that figures may depend on."""
    return {'diffseg': __version__, **{package.__name__: package.__version__ for package in PACKAGES}}


def write_result(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1))

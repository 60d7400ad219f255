"""Homographies from matches, and their accuracy."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffseg.engine import ResultFileHook
from diffseg.evaluation import HomographyMetric, corner_error, estimate_homography
from diffseg.evaluation.homography import METHODS, transform
from diffseg.structures import HomographySample

SIZE = 60, 80  # height, width
TRUTH = np.array([[0.9, 0.2, 3], [-0.1, 1.1, 5], [1e-3, -5e-4, 1]])


def shift(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], float)


def make_sample(sequence: str, truth: np.ndarray, found: np.ndarray, count: int = 12) -> dict:
    """A pair whose matches agree with `found`, as an evaluator gets it; keypoints of image 1 are in reverse order."""
    points = np.random.default_rng(0).uniform((0, 0), SIZE[::-1], (count, 2))
    meta = {'pair_id': f'{sequence}-1-2', 'sequence': sequence, 'keypoint_source': 'a folder'}
    meta |= {f'{kind}_shape{view}': SIZE for kind in ('ori', 'img') for view in (0, 1)} | {'protocol': {'layers': []}}
    sample = HomographySample(metainfo=meta)
    sample.homography = torch.from_numpy(truth)
    sample.keypoints0 = torch.from_numpy(points.astype(np.float32))
    sample.keypoints1 = torch.from_numpy(transform(found, points)[::-1].astype(np.float32))
    rows = torch.arange(count)
    sample.pred_matches = torch.stack([rows, rows.flip(0)], dim=1)
    return sample.to_dict()


def evaluate(samples: list[dict], **options) -> dict[str, float]:
    metric = HomographyMetric(**options)
    metric.dataset_meta = {'dataset': 'HPatches', 'num_sequences': 2}
    metric.process(None, samples)
    return metric.evaluate(len(samples))


def test_corner_error_by_hand():
    assert corner_error(TRUTH, TRUTH, SIZE) == 0
    assert corner_error(shift(3, 4), np.eye(3), SIZE) == pytest.approx(5)
    assert corner_error(2 * TRUTH, TRUTH, SIZE) == pytest.approx(0, abs=1e-9)  # the same homography
    # twice as wide: corners on the left stay, those on the right are off by the whole width less one pixel
    assert corner_error(np.diag([2.0, 1, 1]), np.eye(3), SIZE) == pytest.approx(79 / 2)


@pytest.mark.parametrize('method', METHODS)
def test_the_homography_is_found_among_outliers(method):
    rng = np.random.default_rng(1)
    source = rng.uniform((0, 0), SIZE[::-1], (60, 2))
    target = transform(TRUTH, source)
    target[:20] += rng.uniform(15, 40, (20, 2))
    homography, inliers = estimate_homography(source, target, method, 3)
    assert corner_error(homography, TRUTH, SIZE) < 1e-3
    assert inliers.tolist() == [False] * 20 + [True] * 40


@pytest.mark.parametrize('method', METHODS)
def test_too_little_gives_none(method):
    source = np.random.default_rng(0).uniform(0, 50, (3, 2))
    assert estimate_homography(source, source, method)[0] is None
    equal = np.ones((10, 2))
    homography, inliers = estimate_homography(equal, equal, method)
    assert homography is None and inliers.shape == (10,) and not inliers.any()


def test_other_methods_and_unequal_numbers_are_refused():
    points = np.zeros((5, 2))
    with pytest.raises(ValueError, match="method is 'usac', choose from ransac, lmeds, magsac"):
        estimate_homography(points, points, 'usac')
    with pytest.raises(ValueError, match='usac'):
        HomographyMetric('usac')
    with pytest.raises(ValueError, match=r'\(5, 2\) and target \(4, 2\)'):
        estimate_homography(points, points[:4])


@pytest.mark.parametrize('method', METHODS)
def test_accuracy_of_what_is_right_is_100(method):
    samples = [make_sample('i_a', np.eye(3), np.eye(3)), make_sample('v_a', TRUTH, TRUTH)]
    figures = evaluate(samples, method=method)
    assert {name: value for name, value in figures.items() if 'accuracy' in name} == {
        f'accuracy@{t}px/{group}': 100 for t in (1, 3, 5) for group in ('all', 'illumination', 'viewpoint')
    }
    assert figures['matches/all'] == 12 and figures['failures/all'] == 0


def test_accuracy_by_hand(tmp_path):
    samples = [
        make_sample('i_a', np.eye(3), shift(0, 0.5)),
        make_sample('v_a', np.eye(3), shift(0, 2)),
        make_sample('v_b', np.eye(3), shift(3, 2.6)),  # 3.97
        make_sample('v_c', np.eye(3), np.eye(3), count=3),  # too few
    ]
    figures = evaluate(samples, out_file=str(tmp_path / 'homography.json'))
    expected = {'all': (25, 50, 75), 'illumination': (100, 100, 100), 'viewpoint': (0, 100 / 3, 200 / 3)}
    for group, values in expected.items():
        assert [figures[f'accuracy@{t}px/{group}'] for t in (1, 3, 5)] == pytest.approx(values)
    assert figures['failures/viewpoint'] == 1 and figures['failures/illumination'] == 0
    assert figures['matches/viewpoint'] == 9

    result = json.loads((tmp_path / 'homography.json').read_text())
    assert result['figures'] == figures
    assert [pair['error'] for pair in result['pairs']] == pytest.approx([0.5, 2, 3.97, None], abs=1e-2)
    assert result['pairs'][0]['keypoints'] == [12, 12] and result['pairs'][0]['inliers'] == 12
    protocol = result['protocol']
    assert protocol['pairs'] == 4 and protocol['loaded_size'] == list(SIZE) and protocol['keypoints'] == 'a folder'
    assert protocol['method'] == 'ransac' and 'cv2' in protocol['versions'] and 'layers' in protocol


def test_groups_without_pairs_are_left_out():
    assert not any('viewpoint' in name for name in evaluate([make_sample('i_a', np.eye(3), np.eye(3))]))


def test_the_result_file_goes_into_the_work_dir(tmp_path):
    metric = HomographyMetric(out_file='homography.json')
    runner = SimpleNamespace(work_dir=str(tmp_path), test_evaluator=SimpleNamespace(metrics=[metric]))
    ResultFileHook().before_test(runner)
    assert metric.out_file == str(tmp_path / 'homography.json')

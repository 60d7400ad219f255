import csv

import numpy as np
import pytest
import torch
import videos

from diffseg.datasets import DAVISDataset, LoadVideo
from diffseg.evaluation import DAVISMetric
from diffseg.evaluation.davis import boundary, boundary_accuracy, region_similarity, score_video, statistics
from diffseg.masks import read_mask


def square(y, x, side, shape=(60, 80)):
    mask = np.zeros(shape, bool)
    mask[y : y + side, x : x + side] = True
    return mask


def test_identity_is_one():
    rng = np.random.default_rng(0)
    for mask in (square(10, 10, 20), rng.random((30, 40)) > 0.5, np.zeros((9, 9), bool), np.ones((9, 9), bool)):
        assert region_similarity(mask, mask) == 1
        assert boundary_accuracy(mask, mask) == 1


def test_region_similarity_by_hand():
    assert region_similarity(square(0, 0, 4), square(0, 2, 4)) == pytest.approx(8 / 24)
    assert region_similarity(square(0, 0, 4), square(10, 10, 4)) == 0
    void = square(0, 4, 4)
    assert region_similarity(square(0, 0, 4), square(0, 2, 4), void) == pytest.approx(8 / 16)


def test_boundaries_lie_before_the_change_and_not_at_the_image_edge():
    assert np.argwhere(boundary(square(1, 1, 1, (4, 4)))).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    half = np.zeros((4, 5), bool)
    half[:, 2:] = True
    assert (boundary(half) == (np.arange(5) == 1)).all()
    assert not boundary(np.ones((3, 3), bool)).any()


def test_boundary_accuracy_by_hand():
    # diagonal 100 pixels, so the tolerance is one pixel; upright edges of 60 pixels
    edge = {x: np.broadcast_to(np.arange(80) >= x, (60, 80)) for x in (20, 21, 22, 40)}
    assert boundary_accuracy(edge[20], edge[21]) == 1
    assert boundary_accuracy(edge[20], edge[22]) == 0
    # of two predicted edges one is right: precision 1/2, recall 1
    assert boundary_accuracy(edge[20], edge[20] & ~edge[40]) == pytest.approx(2 / 3)
    assert boundary_accuracy(edge[20], np.zeros((60, 80), bool)) == 0
    # where the second one is void it does not count
    assert boundary_accuracy(edge[20], edge[20], edge[40]) == 1


def test_statistics_by_hand():
    values = np.array([1, 1, 0.5, 0.5, 0.8, 0.2, 0, 0.4])
    # quarters of eight frames end at 1, 2.75, 4.5, 6.25, 8: frames 1-3 and 6-8
    expected = values.mean(), 3 / 8, (1 + 1 + 0.5) / 3 - (0.2 + 0 + 0.4) / 3
    assert statistics(values) == pytest.approx(expected)
    assert statistics(np.ones(1)).tolist() == [1, 1, 0]


def test_ends_do_not_count_and_missing_objects_are_zero():
    truth = np.stack([square(10, 10 + t, 20) + 2 * square(40, 50 + t, 15) for t in range(5)]).astype(np.uint8)
    predicted = truth.copy()
    predicted[[0, -1]] = 0
    assert (score_video(truth, predicted) == 1).all()
    predicted[predicted == 2] = 0
    figures = score_video(truth, predicted)  # (2, objects, 3)
    assert figures.shape == (2, 2, 3)
    assert (figures[:, 0] == 1).all()
    assert (figures[:, 1] == 0).all()


def test_void_does_not_count():
    truth = np.stack([square(10, 10, 20).astype(np.uint8)] * 3)
    truth[:, :, 30:] = 255
    predicted = np.where(truth == 255, 1, truth)
    predicted[0] = truth[0]  # as models give it back
    assert (score_video(truth, predicted) == 1).all()


@pytest.mark.parametrize(
    ('truth', 'predicted', 'message'),
    [
        (np.ones((4, 8, 8)), np.ones((4, 8, 9)), 'original size'),
        (np.ones((2, 8, 8)), np.ones((2, 8, 8)), 'has 2 frames'),
        (np.zeros((4, 8, 8)), np.zeros((4, 8, 8)), 'has no object'),
        (np.ones((4, 8, 8)), np.full((4, 8, 8), 2), 'object 2 is predicted, the first frame has objects 1 to 1'),
    ],
)
def test_what_cannot_be_scored(truth, predicted, message):
    with pytest.raises(ValueError, match=message):
        score_video(truth.astype(np.uint8), predicted.astype(np.uint8))


def test_metric(tmp_path):
    root = videos.write_davis(tmp_path)
    samples = videos.batch_of(DAVISDataset(str(root), pipeline=[LoadVideo(short_side=32)]))['data_samples']
    for sample, missing in zip(samples, (None, 2), strict=True):
        masks = np.stack([read_mask(path, sample.ori_shape) for path in sample.annotation_paths])
        sample.pred_masks = torch.from_numpy(np.where(masks == missing, 0, masks))
    metric = DAVISMetric(out_file=str(tmp_path / 'results/davis.csv'))
    metric.process(None, [sample.to_dict() for sample in samples])
    figures = metric.evaluate(size=2)
    assert figures == {
        **{'J&F-Mean': 75, 'J-Mean': 75, 'J-Recall': 75, 'J-Decay': 0, 'F-Mean': 75, 'F-Recall': 75, 'F-Decay': 0}
    }
    rows = list(csv.DictReader((tmp_path / 'results/davis.csv').open()))
    assert [row['Sequence'] for row in rows] == ['video-0_1', 'video-0_2', 'video-1_1', 'video-1_2']
    assert [float(row['F-Mean']) for row in rows] == [100, 100, 100, 0]

import pytest
import torch
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS

from diffseg.evaluation.scarce import areas, class_iou

PREDICTION = torch.tensor([[0, 0, 1, 1], [0, 2, 1, 1]])
TRUTH = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 255]], dtype=torch.uint8)


def evaluate(metric, *pairs, classes=3, **meta):
    metric = METRICS.build(metric)
    metric.dataset_meta = {'classes': [str(i) for i in range(classes)], **meta}
    samples = [
        {'pred_sem_seg': {'data': prediction[None]}, 'gt_sem_seg': {'data': truth[None]}} for prediction, truth in pairs
    ]
    metric.process({}, samples)
    return metric.evaluate(len(samples))


def test_by_hand():
    # class 0: 3 of 4; class 1: 2 of 5, where the pixel of ignored truth is in the union; class 2: predicted once
    assert areas(PREDICTION, TRUTH, 4).tolist() == [[3, 2, 0, 0], [4, 5, 1, 0]]
    assert class_iou(areas(PREDICTION, TRUTH, 4)).tolist() == [0.75, 0.4, 0, 0]
    metrics = evaluate({'type': 'ScarceIoUMetric'}, (PREDICTION, TRUTH))
    assert metrics['scarce/mIoU'] == pytest.approx(100 * (0.75 + 0.4) / 3)


def test_absent_classes_count_and_the_ignored_one_does_not():
    figures = evaluate({'type': 'ScarceIoUMetric'}, (PREDICTION, TRUTH), classes=4, ignore_label=0)
    assert figures['scarce/mIoU'] == pytest.approx(100 * 0.4 / 3)


def test_whole_data_set_not_mean_over_pictures():
    other = torch.zeros_like(PREDICTION), torch.zeros_like(TRUTH)
    # class 0: (3 + 8) / (4 + 8)
    figures = evaluate({'type': 'ScarceIoUMetric'}, (PREDICTION, TRUTH), other)
    assert figures['scarce/mIoU'] == pytest.approx(100 * (11 / 12 + 0.4) / 3)


def test_identity_is_one():
    truth = torch.arange(12).view(3, 4) % 3
    assert class_iou(areas(truth, truth, 3)).tolist() == [1, 1, 1]
    metrics = evaluate({'type': 'ScarceIoUMetric'}, (truth, truth))
    assert metrics == {'aAcc': 100, 'mIoU': 100, 'mAcc': 100, 'scarce/mIoU': 100}


def test_equals_mmseg_where_all_classes_are_present_and_none_is_ignored():
    generator = torch.Generator().manual_seed(0)
    pairs = [tuple(torch.randint(5, (2, 8, 8), generator=generator)) for _ in range(3)]
    metrics, expected = (evaluate({'type': kind}, *pairs, classes=5) for kind in ('ScarceIoUMetric', IoUMetric))
    assert metrics['scarce/mIoU'] == pytest.approx(expected['mIoU'], abs=0.005)


def test_the_metrics_of_mmseg_are_given_as_well():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(5, (8, 8), generator=generator)
    pair = truth.flip(0), torch.where(truth == 4, 255, truth)  # a class is absent, and its pixels are ignored
    metrics = evaluate({'type': 'ScarceIoUMetric', 'iou_metrics': ['mDice']}, pair, classes=6)
    expected = evaluate({'type': IoUMetric, 'iou_metrics': ['mDice']}, pair, classes=6)
    assert metrics == {**expected, 'scarce/mIoU': metrics['scarce/mIoU']}
    assert 'mDice' in metrics

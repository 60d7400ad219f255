import numpy as np
import pytest

from diffseg.evaluation import JHMDBMetric
from diffseg.evaluation.jhmdb import joint_distances, joint_pck

# two joints 100 pixels apart, so that a person's size is 60 pixels
JOINTS = np.tile([[10.0, 20.0], [70.0, 100.0]], (4, 1, 1))


def test_distances_by_hand():
    predicted = JOINTS + np.array([[[500, 0]], [[3, 0]], [[0, 6]], [[0, 0]]])  # the first frame does not count
    assert joint_distances(JOINTS, predicted) == pytest.approx(np.array([[0.05, 0.05], [0.1, 0.1], [0, 0]]))


def test_joints_that_are_not_predicted_do_not_count():
    predicted = JOINTS.copy()
    predicted[1, 0] = -1
    predicted[2] = -1
    distances = joint_distances(JOINTS, predicted)
    # alone in its frame, the second joint has a box without extent
    assert np.isnan(distances).tolist() == [[True, False], [True, True], [False, False]]
    assert distances[0, 1] == np.inf
    assert distances[2].tolist() == [0, 0]


def test_pck_is_the_mean_over_joints():
    nan = np.nan
    distances = np.array([[0.05, 0.3, nan], [0.15, nan, nan], [0.1, nan, nan], [0.5, nan, nan]])
    assert joint_pck(distances, 0.1) == pytest.approx(100 * (2 / 4 + 0 + 0) / 3)
    assert joint_pck(distances, 0.2) == pytest.approx(100 * (3 / 4 + 0 + 0) / 3)
    assert joint_pck(distances, 0.3) == pytest.approx(100 * (3 / 4 + 1 + 0) / 3)


def test_metric_of_identity_and_of_a_shift():
    metric = JHMDBMetric()
    metric.process(None, [{'video_id': 'a', 'joints': JOINTS, 'pred_joints': JOINTS}])
    assert metric.evaluate(size=1) == {'PCK@0.1': 100, 'PCK@0.2': 100, 'missed': 0}
    shifted = JOINTS + np.array([9, 0])  # 0.15 of the size
    metric.process(None, [{'video_id': 'a', 'joints': JOINTS, 'pred_joints': shifted}])
    assert metric.evaluate(size=1) == {'PCK@0.1': 0, 'PCK@0.2': 100, 'missed': 0}


def test_videos_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match='video a: joints have shape'):
        JHMDBMetric().process(None, [{'video_id': 'a', 'joints': JOINTS, 'pred_joints': JOINTS[:3]}])

import numpy as np
import pytest
from clips import draw_clip
from quadrupeds import draw_sample

from diffseg.datasets.toy import KEYPOINTS, SPECIES


@pytest.fixture(scope='module')
def clips():
    return [draw_clip(0, index, frames=8, height=48, width=80) for index in range(6)]


def test_shapes_and_objects(clips):
    assert {len(clip.species) for clip in clips} == {1, 2}
    for clip in clips:
        assert clip.images.shape == (8, 48, 80, 3)
        assert clip.images.dtype == clip.masks.dtype == np.uint8
        assert clip.keypoints.shape == (len(clip.species), 8, len(KEYPOINTS), 2)
        assert set(clip.species) <= set(SPECIES)
        assert clip.masks.max() == len(clip.species)
        for number in range(1, len(clip.species) + 1):
            assert (clip.masks[0] == number).mean() > 0.02


def test_masks_follow_keypoints(clips):
    for clip in clips:
        number = len(clip.species)  # the animal in front
        for mask, points in zip(clip.masks, clip.keypoints[number - 1], strict=True):
            for name in ('eye', 'back', 'belly', 'withers'):
                x, y = points[KEYPOINTS.index(name)].round().astype(int)
                assert mask[y, x] == number


def test_motion_is_smooth_and_there_is_some(clips):
    for clip in clips:
        steps = np.linalg.norm(np.diff(clip.keypoints, axis=1), axis=-1)  # (animals, 7, 14)
        assert steps.max() < 0.3 * 48
        assert steps.sum(axis=1).max() > 0.1 * 48
        assert (clip.images[0] != clip.images[-1]).any()


def test_same_seed_same_bytes():
    first, again, other = (draw_clip(seed, 3, frames=2, height=32, width=40) for seed in (5, 5, 6))
    assert first.images.tobytes() == again.images.tobytes()
    assert first.masks.tobytes() == again.masks.tobytes()
    assert first.images.tobytes() != other.images.tobytes()


def test_numbers_out_of_range():
    for wrong in ({'frames': 1}, {'height': 20}, {'animals': 3}):
        with pytest.raises(ValueError, match=f'{next(iter(wrong))} is {next(iter(wrong.values()))}'):
            draw_clip(0, 0, **{'frames': 2, 'height': 32, 'width': 32, **wrong})


def test_single_animals_are_those_of_earlier_versions():
    # the pretrained model and published figures of the toy sets rest on them
    points = np.array([draw_sample(0, index, 64, species).keypoints.sum() for index, species in enumerate(SPECIES)])
    assert np.allclose(points, [927.6641093, 832.581174, 601.0303725, 736.9588197], atol=1e-6)

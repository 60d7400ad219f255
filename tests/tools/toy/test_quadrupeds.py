import numpy as np
import pytest
from quadrupeds import draw_sample

from diffseg.datasets.toy import KEYPOINTS, PARTS, SPECIES


@pytest.mark.parametrize('species', SPECIES)
def test_masks_keypoints_and_boxes_agree(species):
    for index in range(8):
        sample = draw_sample(0, index, 64, species)
        assert sample.image.shape == (64, 64, 3)
        assert sample.image.dtype == sample.mask.dtype == np.uint8
        assert sample.species == species
        x1, y1, x2, y2 = sample.bbox
        outside = sample.mask.copy()
        outside[y1:y2, x1:x2] = 0
        assert not outside.any()
        assert sample.mask[[y1, y2 - 1]].any(axis=1).all()
        assert sample.mask[:, [x1, x2 - 1]].any(axis=0).all()
        assert sample.keypoints.shape == (len(KEYPOINTS), 2)
        assert (sample.keypoints >= 0).all()
        assert (sample.keypoints < 64).all()
        assert sample.visible[KEYPOINTS.index('eye')]


def test_every_part_is_drawn_and_heads_are_where_the_animal_faces():
    counts = np.zeros(len(PARTS))
    for index in range(40):
        sample = draw_sample(0, index)
        counts += np.bincount(sample.mask.ravel(), minlength=len(PARTS)) > 0
        head, tail = (np.nonzero(sample.mask == PARTS.index(part))[1].mean() for part in ('head', 'torso'))
        assert (head > tail) == (sample.facing == 'right')
    assert (counts >= 38).all()


def test_colour_does_not_tell_parts_apart():
    # the parts' mean brightness, relative to their own animal's, is the same on average
    differences = []
    for index in range(150):
        sample = draw_sample(3, index)
        grey = sample.image.mean(axis=-1)
        animal = grey[sample.mask > 0].mean()
        torso, head = (grey[sample.mask == PARTS.index(part)].mean() - animal for part in ('torso', 'head'))
        differences.append(torso - head)
    assert abs(np.mean(differences)) < 12
    assert np.std(differences) > 12


def test_same_seed_same_bytes():
    first, again, other = draw_sample(5, 1), draw_sample(5, 1), draw_sample(5, 2)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.mask.tobytes() == again.mask.tobytes()
    assert first.image.tobytes() != other.image.tobytes()


def test_sizes_show_the_same_animal():
    small, large = draw_sample(0, 4, 64), draw_sample(0, 4, 128)
    assert np.allclose(2 * small.keypoints, large.keypoints, atol=1e-6)
    assert (small.mask == large.mask[1::2, 1::2]).mean() > 0.97


def test_bad_input():
    with pytest.raises(ValueError, match=r'unicorn.*horse'):
        draw_sample(0, 0, species='unicorn')
    with pytest.raises(ValueError, match='at least 16'):
        draw_sample(0, 0, size=8)

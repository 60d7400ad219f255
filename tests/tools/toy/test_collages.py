import numpy as np
import pytest
from collages import draw_collage, fractal_noise


def test_a_collage_depends_on_its_series_and_number():
    pictures = [draw_collage(*place, size=32) for place in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert all(picture.shape == (32, 32, 3) for picture in pictures)
    assert all(picture.dtype == np.uint8 for picture in pictures)
    assert (pictures[0] == pictures[1]).all()
    differences = [np.abs(pictures[0].astype(float) - other).mean() for other in pictures[2:]]
    assert min(differences) > 10, differences


def test_a_picture_too_small_for_its_textures_is_refused():
    assert draw_collage(0, 0, size=16).std() > 5
    with pytest.raises(ValueError, match='size is 15, collages need at least 16 pixels'):
        draw_collage(0, 0, size=15)


def test_noise_that_persists_is_rougher():
    def roughness(persistence):
        noise = fractal_noise(np.random.default_rng(0), 64, 2, persistence)
        assert np.isclose(noise.std(), 1)
        return np.abs(np.diff(noise)).mean()

    assert roughness(0.9) > 2 * roughness(0.3)

"""Points of interest from files and detectors."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import SuperPointConfig, SuperPointForKeypointDetection

from diffseg.keypoints import load_superpoint, read_keypoints, sift_keypoints, strongest, superpoint_keypoints


@pytest.fixture
def image() -> Image.Image:
    """Discs on grey, 96 x 64 pixels."""
    image = Image.new('RGB', (96, 64), (128, 128, 128))
    paint = ImageDraw.Draw(image)
    for x, y, radius in [(20, 20, 4), (60, 40, 6), (80, 15, 5)]:
        paint.ellipse((x - radius, y - radius, x + radius, y + radius), (255, 255, 255))
    return image


@pytest.mark.parametrize(
    ('name', 'content'), [('a.kp', '1 2\n3.5 4e1\n'), ('a.csv', '1,2\n\n3.5, 40\n'), ('a.json', '[[1, 2], [3.5, 40]]')]
)
def test_points_are_read_in_their_order(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    points = read_keypoints(tmp_path / name)
    assert points.dtype == np.float32 and points.tolist() == [[1, 2], [3.5, 40]]


def test_arrays_and_empty_files(tmp_path):
    np.save(tmp_path / 'a.npy', np.array([[1, 2]]))
    assert read_keypoints(tmp_path / 'a.npy').tolist() == [[1, 2]]
    (tmp_path / 'a.kp').write_text('\n')
    assert read_keypoints(tmp_path / 'a.kp').shape == (0, 2)


@pytest.mark.parametrize('content', ['1 2 0.9\n', '1 2\n3\n', 'x y\n1 2\n', '1 nan\n'])
def test_other_content_is_refused_by_name(tmp_path, content):
    (tmp_path / 'a.kp').write_text(content)
    with pytest.raises(ValueError, match=r'a\.kp'):
        read_keypoints(tmp_path / 'a.kp')


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r'a\.kp: cannot be read as points'):
        read_keypoints(tmp_path / 'a.kp')


def test_the_strongest_points_are_kept_once_each_and_sorted():
    points = np.array([[5, 1], [2, 2], [5, 1], [1, 9], [0, 0]], np.float32)
    assert strongest(points, np.array([3, 2, 5, 4, 1]), 3).tolist() == [[1, 9], [2, 2], [5, 1]]


def test_sift_finds_blobs_at_their_middle(image):
    points = sift_keypoints(image, 3)
    for middle in [(20, 20), (60, 40), (80, 15)]:
        assert np.linalg.norm(points - middle, axis=1).min() < 1
    assert len(sift_keypoints(Image.new('RGB', (64, 64)), 10)) == 0


def test_superpoint_finds_whole_pixels_of_the_image(image, tmp_path):
    torch.manual_seed(0)
    config = SuperPointConfig(encoder_hidden_sizes=[8, 8, 8, 8], decoder_hidden_size=8, descriptor_decoder_dim=8)
    SuperPointForKeypointDetection(config).save_pretrained(tmp_path)
    points = superpoint_keypoints(image, load_superpoint(str(tmp_path)), 20)
    assert len(points) == 20 == len(np.unique(points, axis=0))
    assert (points == points.round()).all() and (points >= 0).all() and (points < image.size).all()
    with pytest.raises(ValueError, match='cannot be loaded as SuperPoint'):
        load_superpoint(str(tmp_path / 'elsewhere'))

"""Stickers: read, matched by hand, warped by homographies and splines, and laid over images."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from diffseg.edits import (
    composite,
    fit_homography,
    fit_spline,
    read_sticker,
    sample_points,
    warp_homography,
    warp_spline,
)
from diffseg.evaluation.homography import transform
from diffseg.models.correspondence import match_points

SIZE = 96, 128
HOMOGRAPHY = np.array([[0.9, 0.2, 3], [-0.1, 1.1, 8], [4e-4, 2e-4, 1]])
MIRROR = np.array([[-1, 0, 127], [0, 1, 0], [0, 0, 1.0]])


@pytest.fixture
def sticker() -> np.ndarray:
    """An opaque rectangle whose colours say where a pixel comes from."""
    rgba = np.zeros((*SIZE, 4), np.uint8)
    y, x = np.mgrid[30:70, 30:100]
    rgba[30:70, 30:100] = np.stack([2 * x, 2 * y, np.full_like(x, 77), np.full_like(x, 255)], axis=2)
    return rgba


@pytest.fixture
def points(sticker) -> np.ndarray:
    return sample_points(sticker, 300)


def bend(points: np.ndarray) -> np.ndarray:
    """Like an arm: shifted up and down along its length."""
    return points + np.stack([np.zeros(len(points)), 8 * np.sin(points[:, 0] / 14)], axis=1)


def overlap(warped: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of opaque pixels."""
    a, b = warped[..., 3] > 0.5, truth > 0.5
    return (a & b).sum() / (a | b).sum()


def test_a_sticker_is_read_as_drawn(tmp_path, sticker):
    Image.fromarray(sticker).save(tmp_path / 's.png')
    assert np.array_equal(read_sticker(tmp_path / 's.png', SIZE), sticker)
    grey = Image.fromarray(sticker).convert('LA')
    grey.save(tmp_path / 'grey.png')
    assert np.array_equal(read_sticker(tmp_path / 'grey.png', SIZE)[..., 3], sticker[..., 3])


def test_stickers_that_cannot_be_used(tmp_path, sticker):
    Image.fromarray(sticker).save(tmp_path / 's.png')
    Image.fromarray(sticker[..., :3]).save(tmp_path / 'rgb.png')
    Image.fromarray(sticker * np.uint8([1, 1, 1, 0])).save(tmp_path / 'empty.png')
    (tmp_path / 'text.png').write_text('no image')
    for name, size, message in (
        ('rgb.png', SIZE, "mode 'RGB', no alpha channel.* save it as a PNG with transparency"),
        ('s.png', (128, 96), 'has 128 x 96 pixels, but the source has 96 x 128'),
        ('empty.png', SIZE, 'is transparent everywhere'),
        ('text.png', SIZE, 'cannot be read as an image'),
        ('missing.png', SIZE, 'cannot be read as an image'),
    ):
        with pytest.raises(ValueError, match=message):
            read_sticker(tmp_path / name, size)


def test_points_are_distinct_pixels_of_the_sticker(sticker):
    points = sample_points(sticker, 500)
    assert len(points) == len(np.unique(points, axis=0)) == 500
    assert sticker[points[:, 1], points[:, 0], 3].all()
    assert np.array_equal(points, sample_points(sticker, 500))
    assert not np.array_equal(points, sample_points(sticker, 500, seed=1))
    assert len(sample_points(sticker, 10**6)) == 40 * 70


@pytest.mark.parametrize('homography', [np.eye(3), HOMOGRAPHY, MIRROR], ids=['identity', 'perspective', 'mirror'])
def test_a_homography_is_found_among_outliers(sticker, points, homography):
    matches = transform(homography, points)
    rng = np.random.default_rng(0)
    wrong = rng.permutation(300)[:120]
    matches[wrong] = rng.uniform((0, 0), SIZE[::-1], (120, 2))
    found, inliers = fit_homography(points, matches, sticker, SIZE, 1)
    assert np.allclose(transform(found, points), transform(homography, points), atol=0.05)
    assert inliers.sum() >= 180 and inliers[wrong].sum() <= 3
    warped = warp_homography(sticker, found, SIZE)
    y, x = np.nonzero(warped[..., 3] == 1)
    origin = transform(np.linalg.inv(homography), np.stack([x, y], axis=1))
    assert len(x) > 1500 and np.abs(warped[y, x, :2] * 255 / 2 - origin).max() < 0.6  # colours say where from


def test_the_features_of_a_warped_image_carry_its_sticker(sticker, points):
    maps = torch.nn.functional.interpolate(torch.randn(1, 16, 12, 16), SIZE, mode='bicubic')[0]
    moved = cv2.warpPerspective(maps.permute(1, 2, 0).numpy(), HOMOGRAPHY, SIZE[::-1], borderMode=cv2.BORDER_REPLICATE)
    matches = match_points(maps, torch.from_numpy(moved).permute(2, 0, 1), torch.from_numpy(points), SIZE, SIZE)
    found, inliers = fit_homography(points, matches.numpy(), sticker, SIZE, 2)
    assert inliers.mean() > 0.8
    truth = cv2.warpPerspective(sticker[..., 3] / 255, HOMOGRAPHY, SIZE[::-1])
    assert overlap(warp_homography(sticker, found, SIZE), truth) > 0.95


@pytest.mark.parametrize('smoothing, error, least', [(0.01, 5.5, 0.88), (1e-4, 0.5, 0.97)])
def test_a_spline_follows_what_a_homography_cannot(sticker, points, smoothing, error, least):
    matches = bend(points)
    rng = np.random.default_rng(0)
    wrong = rng.permutation(300)[:60]
    matches[wrong] = rng.uniform((0, 0), SIZE[::-1], (60, 2))
    returned = points.astype(float)
    returned[wrong[:30]] += 20  # the other half is for the neighbours to find out
    backward, used = fit_spline(points, matches, returned, SIZE, SIZE, threshold=3, tolerance=2, smoothing=smoothing)
    assert used.sum() > 200 and used[wrong].sum() <= 3
    y, x = np.nonzero(warp_spline(sticker, backward)[..., 3] > 0.99)
    assert len(x) > 2500 and np.abs(bend(backward[y, x]) - np.stack([x, y], axis=1)).max() < error
    y, x = np.mgrid[: SIZE[0], : SIZE[1]].astype(np.float32)
    truth = cv2.remap(sticker[..., 3] / 255, x, y - 8 * np.sin(x / 14), cv2.INTER_LINEAR)
    homography, _ = fit_homography(points, matches, sticker, SIZE, 3)
    bent, straight = warp_spline(sticker, backward), warp_homography(sticker, homography, SIZE)
    assert overlap(bent, truth) > least > 0.8 > overlap(straight, truth)


def test_a_spline_is_evaluated_alike_at_all_sizes(points):
    """Beyond 128 pixels it is interpolated between every few."""
    maps = [fit_spline(points, s * bend(points), points, SIZE, (96 * s, 128 * s), 3 * s, 2)[0] for s in (1, 4)]
    coarse, fine = maps[0], maps[1][::4, ::4]
    reached = (coarse[..., 0] >= 0) & (fine[..., 0] >= 0)
    assert reached.sum() > 2500 and np.abs(coarse - fine)[reached].max() < 0.5


def test_matches_that_support_nothing(sticker, points):
    rng = np.random.default_rng(0)
    scattered = rng.uniform((0, 0), SIZE[::-1], (300, 2))
    few = points[:5]
    line = np.stack([points[:, 0], np.full(300, 50.0)], axis=1)
    one_place = np.full((300, 2), 40.0) + rng.uniform(0, 0.2, (300, 2))
    for matches, message in (
        (scattered, 'of 300 matches agree with one homography to 2 px, needed are 30; use other layers'),
        (one_place, 'of 300 matches agree|nearly singular|turns a part'),
        (line, 'of 300 matches agree|nearly singular'),
    ):
        with pytest.raises(ValueError, match=message):
            fit_homography(points, matches, sticker, SIZE, 2)
    with pytest.raises(ValueError, match=r'0 of 3 matches agree .* needed are 8; .* a larger sticker'):
        fit_homography(few[:3], few[:3], sticker, SIZE, 2)
    with pytest.raises(ValueError, match=r'5 of 5 matches agree with their backward matches .* needed are 8'):
        fit_spline(few, few, few, SIZE, SIZE, 2, 2)
    with pytest.raises(ValueError, match='0 of 300 matches agree with their backward matches to 2 px, needed are 30'):
        fit_spline(points, bend(points), points + 9, SIZE, SIZE, 3, 2)
    with pytest.raises(ValueError, match='of 300 matches agree with their neighbours to 2 px'):
        fit_spline(points, scattered, points, SIZE, SIZE, 2, 2)
    with pytest.raises(ValueError, match=r'agree with an affine map|lie on a line'):
        fit_spline(points, line, points, SIZE, SIZE, 2, 2)


def test_homographies_and_splines_that_turn_a_part_over(sticker, points):
    horizon = np.array([[1, 0, 0], [0, 1, 0], [-1 / 65, 0, 1.0]])  # crosses the sticker at x = 65
    off = np.abs(points[:, 0] - 65) > 3
    with pytest.raises(ValueError, match='turns a part of the sticker over: its horizon crosses'):
        fit_homography(points[off], transform(horizon, points[off]), sticker, SIZE, 1)
    folded = points.astype(float)
    folded[:, 0] = 40 + 0.6 * np.abs(points[:, 0] - 65)  # both halves of the target show one half of the source
    used = fit_spline(folded, points, folded, SIZE, SIZE, 3, 2)[1]
    left = points[:, 0] < 65
    assert used[left].mean() > 0.9 and used[~left].mean() < 0.1  # the larger half is consistent
    with pytest.raises(ValueError, match=r'the spline folds or crushes .* of the sticker, allowed is 10%'):
        fit_spline(folded, points, folded, SIZE, SIZE, 60, 2)


def test_compositing_is_exact(sticker):
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    half = sticker.copy()
    half[30:50, :, 3] //= 2
    result = composite(image, warp_homography(half, np.eye(3), SIZE))
    clear, opaque = half[..., 3] == 0, half[..., 3] == 255
    assert np.array_equal(result[clear], image[clear]) and np.array_equal(result[opaque], half[opaque, :3])
    expected = (half[..., :3].astype(float) * 127 + image.astype(float) * 128) / 255
    mixed = half[..., 3] == 127
    assert mixed.sum() == 20 * 70 and np.abs(result.astype(float) - expected)[mixed].max() <= 0.51


def test_colours_of_transparent_pixels_do_not_seep_in(sticker):
    white, green = sticker.copy(), sticker.copy()
    green[sticker[..., 3] == 0] = 0, 255, 0, 0
    image = np.zeros((*SIZE, 3), np.uint8)
    edited = [composite(image, warp_homography(each, HOMOGRAPHY, SIZE)) for each in (white, green)]
    assert np.array_equal(*edited)

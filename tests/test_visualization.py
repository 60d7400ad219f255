"""Pictures: colours that mean the same everywhere, geometry that is exact, bad input refused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffseg import visualization as vis


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]


@pytest.fixture
def planted():
    """Three orthogonal patterns of falling variance, hidden in 20 channels; and the patterns (3, 12, 10)."""
    generator = torch.Generator().manual_seed(3)
    patterns = torch.linalg.qr(torch.randn(120, 3, generator=generator))[0]
    patterns = torch.linalg.qr(patterns - patterns.mean(0))[0].T.reshape(3, 12, 10)
    mixing = torch.linalg.qr(torch.randn(20, 3, generator=generator))[0]
    return torch.einsum('ck,khw->chw', mixing * torch.tensor([30.0, 10.0, 3.0]), patterns) + 5, patterns


def test_pca_finds_planted_components(planted):
    features, patterns = planted
    components = vis.pca([features])[0]
    for found, true in zip(components, patterns, strict=True):
        assert abs(correlation(found, true)) > 0.9999


def test_pca_is_joint_and_deterministic(planted, monkeypatch):
    features, _ = planted
    torch.manual_seed(1)
    monkeypatch.setattr('torch.cuda.manual_seed_all', lambda seed: pytest.fail('generators of GPUs were seeded'))
    whole = vis.pca_rgb([features])[0]
    state = torch.random.get_rng_state()
    top, bottom = vis.pca_rgb([features[:, :5], features[:, 5:]])
    assert torch.equal(torch.random.get_rng_state(), state), 'the global generator was used'
    torch.testing.assert_close(torch.cat([top, bottom], dim=1), whole, atol=1e-4, rtol=0)
    assert torch.equal(vis.pca_rgb([features])[0], whole)


def test_pca_sign_does_not_depend_on_the_images_sign(planted):
    features, _ = planted
    flipped = vis.pca([features.flip(1)])[0].flip(1)
    torch.testing.assert_close(flipped, vis.pca([features])[0], atol=1e-3, rtol=1e-3)


def test_pca_rgb_uses_the_whole_range_and_survives_constants(planted):
    picture = vis.pca_rgb([planted[0]])[0]
    assert picture.shape == (3, 12, 10)
    assert picture.amin() == 0 and picture.amax() == 1
    assert vis.pca_rgb([torch.ones(8, 4, 4)])[0].isfinite().all()
    assert vis.pca_rgb([torch.randn(8, 1, 2)])[0].shape == (3, 1, 2)


def test_pca_takes_half_precision_and_gradients():
    feature = torch.randn(16, 6, 5, dtype=torch.bfloat16, requires_grad=True)
    assert vis.pca([feature])[0].dtype == torch.float32


@pytest.mark.parametrize(
    ('features', 'message'),
    [
        ([torch.zeros(4, 2, 2), torch.zeros(5, 2, 2)], r'same number of channels, got \[4, 5\]'),
        ([torch.zeros(2, 2, 2)], 'at least as many channels, got 2'),
        ([torch.full((4, 2, 2), torch.nan)], 'NaN'),
    ],
)
def test_pca_refuses(features, message):
    with pytest.raises(ValueError, match=message):
        vis.pca(features)


def test_picture_round_trip():
    image = torch.rand(3, 5, 7) * 2 - 1
    pixels = np.asarray(vis.to_pil(vis.to_picture(image)))
    assert pixels.shape == (5, 7, 3)
    np.testing.assert_allclose(pixels / 127.5 - 1, image.permute(1, 2, 0).numpy(), atol=1 / 255 + 1e-6)


def test_heat_map_limits():
    values = torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    own, wide = vis.heat_map(values), vis.heat_map(values, limits=(0, 8))
    assert own.shape == (3, 2, 2)
    assert torch.equal(own[:, 1, 0], wide[:, 1, 1])
    assert torch.equal(own[:, 0, 0], wide[:, 0, 0])


def test_voc_palette():
    palette = vis.voc_palette(256).tolist()
    assert palette[:4] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette[15] == [192, 128, 128]  # person
    assert palette[255] == [224, 224, 192]
    assert len(set(map(tuple, palette))) == 256


def test_colour_labels():
    labels = torch.tensor([[0, 1], [255, 1]])
    picture = vis.colour_labels(labels, [[0, 0, 0], [255, 0, 51]])
    assert picture[:, 0, 1].tolist() == pytest.approx([1, 0, 0.2])
    assert picture[:, 1, 0].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match=r'0\.\.2 do not fit a palette of 2'):
        vis.colour_labels(torch.tensor([[0, 2]]), [[0, 0, 0], [1, 1, 1]])


def test_overlay_changes_only_the_mask():
    picture, colours = torch.zeros(3, 4, 6), torch.ones(3, 2, 3)
    mask = torch.tensor([[True, False, False], [False, False, False]])
    result = vis.overlay(picture, colours, 0.25, mask)
    assert torch.all(result[:, :2, :2] == 0.25)
    assert result.sum() == 0.25 * 3 * 4
    assert torch.all(vis.overlay(picture, colours, 0.25) == 0.25)


def test_grid_places_every_picture():
    red, blue = torch.zeros(3, 4, 8), torch.zeros(3, 2, 2)
    red[0], blue[2] = 1, 1
    sheet = vis.grid([[red, blue], [blue]], cell=32)
    pixels = np.asarray(sheet)
    counts = [int((pixels == colour).all(-1).sum()) for colour in ([255, 0, 0], [0, 0, 255])]
    assert sheet.size == (4 + 2 * 36, 4 + 2 * 36)
    assert counts == [16 * 32, 2 * 32 * 32]  # the wide picture keeps its shape
    named = vis.grid([[red, blue]], ['a row'], ['up-level1-repeat0-vit-block0-cross-q', 'b'], cell=32)
    assert named.width > sheet.width and named.height > 32


def test_match_lines_join_the_points():
    pictures = torch.zeros(3, 50, 100), torch.zeros(3, 100, 100)
    points = torch.tensor([[20.0, 10.0], [80.0, 40.0]]), torch.tensor([[50.0, 50.0], [90.0, 90.0]])
    sheet = vis.match_lines(pictures, points, torch.tensor([True, False]), height=100)
    assert sheet.size == (200 + 8 + 100, 100)
    assert sheet.getpixel((40, 20)) == vis.CORRECT and sheet.getpixel((208 + 50, 50)) == vis.CORRECT
    assert sheet.getpixel((160, 80)) == vis.WRONG and sheet.getpixel((208 + 90, 90)) == vis.WRONG
    assert vis.match_lines(pictures, (points[0][:0], points[1][:0])).height == 384
    sheet = vis.match_lines(pictures, points, height=100, confidence=torch.tensor([0.0, 1.0]))
    assert sheet.getpixel((40, 20)) == vis.WRONG and sheet.getpixel((160, 80)) == vis.CORRECT
    with pytest.raises(ValueError, match='not by both'):
        vis.match_lines(pictures, points, torch.tensor([True, False]), confidence=torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r'two \(N, 2\)'):
        vis.match_lines(pictures, (points[0], points[1][:1]))


def test_outline_is_drawn_inside_the_picture_and_nowhere_else():
    picture = torch.full((3, 20, 30), 0.5)
    corners = torch.tensor([[5.0, 4.0], [24, 4], [24, 40], [5, 40]])  # the lower ones are outside
    drawn = vis.outline(picture, corners, (255, 0, 0), width=1)
    changed = (drawn - picture).abs().amax(0) > 0.1
    assert changed.sum() == 20 + 2 * 15 and changed[4, 5:25].all() and changed[4:, 5].all() and changed[4:, 24].all()
    assert torch.equal(drawn[:, 4, 10], torch.tensor([1.0, 0, 0]))


def test_mixing_figure():
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.1], [0.2, 0.1]])
    figure = vis.mixing_figure(weights, [0, 100, 261], ['dhf-0-0', 'dhf-1-2'])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ['10.0', '30.0', '20.0', '20.0', '10.0', '10.0']
    assert [label.get_text() for label in axes.get_yticklabels()] == ['dhf-0-0  60%', 'dhf-1-2  40%']
    assert [label.get_text() for label in axes.get_xticklabels()] == ['0\n30%', '100\n40%', '261\n30%']
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    assert Image.open(buffer).width > 200
    with pytest.raises(ValueError, match='2 layers'):
        vis.mixing_figure(weights, [0, 100], ['a', 'b'])

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from diffseg.models.correspondence.matching import (
    UpsampledSimilarity,
    best_buddies,
    descriptors_at,
    match_points,
    mutual_nearest_neighbours,
    upsampled_similarity,
)

SHAPES = [  # cells, pixels
    ((5, 7), (40, 33)),
    ((1, 9), (3, 20)),
    ((9, 1), (20, 5)),
    ((1, 1), (4, 4)),
    ((2, 3), (2, 3)),
    ((6, 6), (6, 50)),
    ((24, 20), (11, 13)),  # fewer pixels than cells
]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize(('cells', 'size'), SHAPES)
def test_similarity_is_that_of_the_upsampled_map(cells, size, dtype):
    maps, queries = torch.randn(70, *cells, dtype=dtype), torch.randn(6, 70, dtype=dtype)
    similarity = UpsampledSimilarity.of(queries, maps, size)
    expected = upsampled_similarity(queries, maps, size)
    assert similarity.size == size
    torch.testing.assert_close(similarity.rows(0, size[0]), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(similarity.rows(1, 2), expected[:, 1:2], rtol=0, atol=1e-12)
    y, x = torch.tensor([0, size[0] - 1]), torch.tensor([size[1] - 1, 0])
    torch.testing.assert_close(similarity.at(torch.tensor([4, 1]), y, x), expected[[4, 1], y, x], rtol=0, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('chunk', [1, 100, 1000, 2**20])
@pytest.mark.parametrize(('cells', 'size'), SHAPES)
def test_the_nearest_neighbour_is_exact(cells, size, chunk, dtype):
    maps, queries = torch.randn(8, *cells, dtype=dtype), torch.randn(40, 8, dtype=dtype)
    matches = UpsampledSimilarity.of(queries, maps, size).argmax(chunk)
    expected = upsampled_similarity(queries, maps, size)
    reached = expected[torch.arange(40), matches[:, 1], matches[:, 0]]
    torch.testing.assert_close(reached, expected.amax((1, 2)), rtol=0, atol=1e-12)


@pytest.mark.parametrize('chunk', [1, 30, 2**20])
def test_of_equal_pixels_the_first_is_taken(chunk):
    maps = torch.randn(8, 1, 1).expand(8, 3, 4)
    assert UpsampledSimilarity.of(torch.randn(2, 8), maps, (6, 8)).argmax(chunk).tolist() == [[0, 0], [0, 0]]
    maps = torch.eye(4).reshape(4, 2, 2)  # beyond the middle of the last cell all pixels are alike
    assert UpsampledSimilarity.of(maps[:, 1, 1][None], maps, (20, 20)).argmax(chunk).tolist() == [[15, 15]]


def test_descriptors_are_those_of_the_upsampled_map():
    maps = torch.randn(6, 5, 3)
    points = torch.tensor([[0, 0], [29, 19], [7, 11], [29, 0]])
    upsampled = F.interpolate(maps[None].double(), (20, 30), mode='bilinear')[0]
    torch.testing.assert_close(descriptors_at(maps, points, (20, 30)), upsampled[:, points[:, 1], points[:, 0]].T)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_an_image_matches_itself_but_at_the_borders_the_first_in_row_order(dtype):
    maps = torch.randn(32, 12, 18).to(dtype)
    for height, width in (48, 72), (50, 41), (12, 18), (7, 5):
        points = torch.cartesian_prod(torch.arange(width), torch.arange(height))
        expected = torch.stack([first_alike(points[:, 0], 18, width), first_alike(points[:, 1], 12, height)], dim=1)
        assert torch.equal(match_points(maps, maps, points, (height, width), (height, width)), expected)
    points = torch.tensor([[3, 0], [0, 6]])
    assert not match_points(maps[:, :1, :1], maps[:, :1, :1], points, (7, 5), (7, 5)).any()


def first_alike(coordinates, cells, pixels):
    """The first pixel between the same centres of cells as each, if it lies beyond the outermost; else the pixel."""
    place = (coordinates + 0.5) * cells / pixels - 0.5
    last = torch.arange(pixels)[(torch.arange(pixels) + 0.5) * cells / pixels - 0.5 >= cells - 1]
    ends = torch.where(place >= cells - 1, last[0] if len(last) else 0, coordinates)
    return torch.where(place <= 0, 0, ends)


def test_on_a_border_the_first_pixel_is_taken_whatever_the_source_point():
    source, target = torch.eye(4).reshape(4, 2, 2), torch.eye(4).flip(1).reshape(4, 2, 2)
    points = torch.tensor([[0, 0], [19, 0], [0, 19], [16, 19]])
    expected = [[22, 22], [0, 22], [22, 0], [0, 0]]
    assert match_points(source, target, points, (20, 20), (30, 30)).tolist() == expected
    assert match_points(source, source, points, (20, 20), (40, 30)).tolist() == [[0, 0], [22, 0], [0, 30], [22, 30]]


def test_a_shift_is_found_at_image_resolution():
    maps = torch.randn(32, 10, 10)
    shifted = torch.roll(maps, shifts=(2, 3), dims=(1, 2))  # y, x
    matches = match_points(maps, shifted, torch.tensor([[18, 14]]), (40, 40), (40, 40))
    assert (matches - torch.tensor([[18 + 12, 14 + 8]])).abs().max() <= 1


@pytest.mark.parametrize(('limit', 'value'), [('QUERIES', 3), ('CHANNELS', 5 * 36)])
def test_many_points_and_large_maps_are_matched_in_parts(monkeypatch, limit, value):
    source, target = torch.randn(2, 16, 6, 6)
    points = torch.randint(0, 30, (7, 2))
    whole = match_points(source, target, points, (30, 30), (40, 50))
    monkeypatch.setattr(f'diffseg.models.correspondence.matching.{limit}', value)
    assert torch.equal(match_points(source, target, points, (30, 30), (40, 50)), whole)


def test_bad_points_channels_and_windows():
    maps = torch.randn(4, 6, 6)
    point = torch.tensor([[0, 0]])
    with pytest.raises(ValueError, match='inside the source image'):
        match_points(maps, maps, torch.tensor([[6, 0]]), (6, 6), (6, 6))
    with pytest.raises(ValueError, match='channels'):
        match_points(maps, maps[:2], point, (6, 6), (6, 6))
    with pytest.raises(ValueError, match='window is 4'):
        match_points(maps, maps, point, (6, 6), (6, 6), window=4)


def test_soft_argmax_is_the_weighted_mean_of_a_window():
    queries, maps, size = torch.randn(3, 8), torch.randn(8, 4, 5), (9, 11)
    soft = UpsampledSimilarity.of(queries, maps, size).soft_argmax(window=5, temperature=0.1)
    for point, peak, similarity in zip(
        soft, match_queries(queries, maps, size), upsampled_similarity(queries, maps, size), strict=True
    ):
        weights = torch.zeros(size, dtype=torch.float64)
        window = [slice(max(c - 2, 0), c + 3) for c in reversed(peak.tolist())]
        weights[window[0], window[1]] = (similarity[window[0], window[1]] / 0.1).exp()
        weights /= weights.sum()
        expected = [(weights.sum(0) * torch.arange(11)).sum(), (weights.sum(1) * torch.arange(9)).sum()]
        torch.testing.assert_close(point, torch.stack(expected))


def match_queries(queries, maps, size):
    return UpsampledSimilarity.of(queries, maps, size).argmax()


def test_soft_argmax_of_one_pixel_or_no_temperature_is_the_argmax():
    queries, maps, size = torch.randn(5, 8), torch.randn(8, 4, 5), (9, 11)
    similarity = UpsampledSimilarity.of(queries, maps, size)
    for options in ({'window': 1}, {'window': 7, 'temperature': 1e-6}):
        torch.testing.assert_close(similarity.soft_argmax(**options), similarity.argmax().double())


@pytest.mark.parametrize('chunk', [1, 100, 2**20])
@pytest.mark.parametrize('metric', ['cosine', 'l2'])
def test_mutual_nearest_neighbours_are_the_published_ones(reference, metric, chunk):
    values = load_file(reference('propagation') / 'propagation.safetensors')
    pairs = mutual_nearest_neighbours(values['desc_a'], values['desc_b'], metric, chunk)
    assert torch.equal(pairs, values[f'mnn_{metric}'])


def test_mutual_nearest_neighbours_by_hand():
    source, target = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 3]]), torch.tensor([[0, 1.0], [2, 0]])
    assert mutual_nearest_neighbours(source, target).tolist() == [[0, 1], [2, 0]]
    assert mutual_nearest_neighbours(source, target[:0]).shape == (0, 2)
    with pytest.raises(ValueError, match='dot'):
        mutual_nearest_neighbours(source, target, 'dot')


def test_best_buddies_are_mutual_salient_and_spread():
    source = torch.randn(16, 6, 5)
    target = source.roll((1, 2), (1, 2))
    saliency = torch.rand(6, 5)
    saliency[0] = 0
    options = dict(source_saliency=saliency, target_saliency=saliency.roll((1, 2), (0, 1)))
    points, matches = best_buddies(source, target, num_pairs=8, **options)
    assert 5 <= len(points) <= 8
    assert len(points.unique(dim=0)) == len(points)
    assert torch.equal((points + torch.tensor([2, 1])) % torch.tensor([5, 6]), matches)
    assert (points[:, 1] > 0).all()
    again, _ = best_buddies(source, target, num_pairs=8, **options)
    assert torch.equal(points, again)
    assert len(best_buddies(source, target, num_pairs=100)[0]) == 30
    assert len(best_buddies(source, target, target_saliency=torch.zeros(6, 5))[0]) == 0


@pytest.mark.parametrize('load_size', [224, 512])
def test_matches_are_those_of_hyperfeatures(reference, load_size):
    """All its predicted points, on real pairs. Its maps have 64 x 64 cells before they are upsampled for matching."""
    folder = reference('spair-scores')
    data = folder.parents[1] / 'SPair-71k-mini'
    maps = load_file(folder / 'descriptors.safetensors')
    maps = {name: F.interpolate(x, 64, mode='bilinear')[0] for name, x in maps.items()}
    expected = json.loads((folder / 'expected.json').read_text())[f'dhf_load{load_size}']['predicted_yx']
    pairs = json.loads((data / 'spair_71k_test-6.json').read_text())
    for pair, predicted in zip(pairs, expected, strict=True):
        size = Image.open(data / 'JPEGImages' / pair['category'] / pair['source_path']).size
        points = torch.from_numpy(np.array(pair['source_points']) * load_size / size)
        points = points.clamp(0, load_size - 1).round()
        source, target = maps[pair['source_path']], maps[pair['target_path']]
        matches = match_points(source, target, points, (load_size, load_size), (load_size, load_size))
        assert matches.flip(1).tolist() == predicted


def test_nearest_neighbours_are_those_of_hyperfeatures(reference):
    folder = reference('hyperfeatures')
    values, inputs = load_file(folder / 'expected.safetensors'), load_file(folder / 'inputs.safetensors')
    source, target = values['hyperfeature']
    points = (inputs['source_points_yx'].flip(1) * 4).clamp(0, 31).round()
    matches = match_points(source, target, points, (32, 32), (32, 32))
    published = values['nn_points_yx'].flip(1)
    assert matches[:2].tolist() == published[:2].tolist() == [[23, 12], [6, 29]]
    assert matches[2].tolist() == [30, 29] and published[2].tolist() == [31, 29]  # alike but for rounding errors there
    similarity = upsampled_similarity(descriptors_at(source, points, (32, 32)), target, (32, 32))[2]
    assert similarity[29, 30] == similarity[29, 31] == similarity.max()


@pytest.mark.parametrize('window', [3, 11])
def test_window_soft_argmax_of_cells_in_plain_lines(window):
    source, target = torch.randn(16, 6, 7), torch.randn(16, 5, 8)
    points = torch.tensor([[0, 0], [69, 59], [31, 40], [12, 50]])
    matches = match_points(source, target, points, (60, 70), (50, 160), window=window, temperature=0.02, unit='cells')
    for (x, y), match in zip(points.tolist(), matches, strict=True):
        query = source[:, y // 10, x // 10]  # cells of 10 x 10 pixels
        similarity = torch.cosine_similarity(query[:, None, None], target, dim=0)
        row, column = divmod(similarity.argmax().item(), 8)
        total, position = 0.0, torch.zeros(2)
        for i in range(max(0, row - window // 2), min(5, row + window // 2 + 1)):
            for j in range(max(0, column - window // 2), min(8, column + window // 2 + 1)):
                weight = math.exp((similarity[i, j] - similarity.max()) / 0.02)
                position += weight * torch.tensor([20 * j + 9.5, 10 * i + 4.5])  # centre of a cell of 20 x 10 pixels
                total += weight
        torch.testing.assert_close(match, position.double() / total, atol=1e-3, rtol=0)


def test_matches_of_cells_without_a_window_are_centres_of_cells():
    maps = torch.randn(16, 6, 7)
    points = torch.tensor([[0, 0], [69, 59], [31, 44]])
    matches = match_points(maps, maps, points, (60, 70), (60, 70), unit='cells')
    torch.testing.assert_close(matches, torch.tensor([[4.5, 4.5], [64.5, 54.5], [34.5, 44.5]], dtype=torch.float64))
    with pytest.raises(ValueError, match="unit is 'cell'; it is 'pixels' or 'cells'"):
        match_points(maps, maps, points, (60, 70), (60, 70), unit='cell')

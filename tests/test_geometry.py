"""Where cells lie in an image."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffseg.geometry import (
    cells_to_pixels,
    fit_to_image,
    map_size,
    pixel_neighbours,
    pixels_to_cells,
    resize,
    sample_points,
)
from diffseg.models.correspondence import match_points

CONVENTIONS = 'centres', 'corners', 'published'
settings.register_profile('geometry', max_examples=25, deadline=None, derandomize=True)
properties = settings(settings.get_profile('geometry'))

pixels = st.tuples(st.integers(2, 130), st.integers(2, 130))
grids = st.tuples(st.integers(1, 12), st.integers(1, 12))
seeds = st.integers(0, 2**31)


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ramp(cells, size, slopes=(0.7, -0.3), offset=2.0):
    """The map (1, h, w) of a linear function of the pixel, and the function."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in cells), indexing='ij')
    centres = cells_to_pixels(torch.stack([x, y], dim=-1), size, cells)

    def value(points):
        return points.double() @ torch.tensor(slopes, dtype=torch.float64) + offset

    return value(centres)[None], value


# ---- coordinates


@properties
@given(pixels, grids, seeds, st.sampled_from(CONVENTIONS))
def test_pixels_to_cells_and_back(size, cells, seed, convention):
    points = 200 * draw(seed, 7, 2)
    there = pixels_to_cells(points, size, cells, convention)
    torch.testing.assert_close(cells_to_pixels(there, size, cells, convention), points)


@properties
@given(pixels, grids)
def test_cells_tile_the_image(size, cells):
    """The borders of the outermost cells are those of the image."""
    corners = torch.tensor([[-0.5, -0.5], [cells[1] - 0.5, cells[0] - 0.5]])
    expected = torch.tensor([[-0.5, -0.5], [size[1] - 0.5, size[0] - 0.5]], dtype=torch.float64)
    torch.testing.assert_close(cells_to_pixels(corners, size, cells), expected)


def test_the_published_conventions_by_hand():
    points = torch.tensor([[0.0, 0], [15, 7]])
    assert pixels_to_cells(points, (8, 16), (2, 4), 'corners').tolist() == [[0, 0], [3.75, 1.75]]
    assert pixels_to_cells(points, (8, 16), (2, 4), 'published').tolist() == [[-0.5, -0.5], [3.5, 1.5]]
    assert pixels_to_cells(points, (8, 16), (2, 4)).tolist() == [[-0.375, -0.375], [3.375, 1.375]]
    with pytest.raises(ValueError, match="convention is 'dift'; it is 'centres' or 'corners' or 'published'"):
        pixels_to_cells(points, (8, 16), (2, 4), 'dift')


# ---- sampling


@properties
@given(pixels, grids, seeds)
def test_at_whole_pixels_sampling_is_resizing(size, cells, seed):
    maps = draw(seed, 3, *cells)
    y, x = torch.meshgrid(*map(torch.arange, size), indexing='ij')
    sampled = sample_points(maps, torch.stack([x, y], dim=-1).flatten(0, 1), size)
    torch.testing.assert_close(sampled.T.unflatten(1, size), F.interpolate(maps[None], size, mode='bilinear')[0])


@properties
@given(pixels, grids, seeds)
def test_neighbours_of_pixels_are_the_weights_of_resizing(size, cells, seed):
    maps, (before, after, fraction) = draw(seed, 1, 3, cells[0]), pixel_neighbours(cells[0], size[0])
    expected = F.interpolate(maps, size[0], mode='linear')
    torch.testing.assert_close(torch.lerp(maps[..., before], maps[..., after], fraction), expected)


@properties
@given(pixels, st.tuples(st.integers(2, 12), st.integers(2, 12)), seeds)
def test_between_the_outermost_centres_linear_functions_are_sampled_exactly(size, cells, seed):
    maps, value = ramp(cells, size)
    inside = draw(seed, 9, 2).sigmoid() * torch.tensor([cells[1] - 1, cells[0] - 1])
    points = cells_to_pixels(inside, size, cells)
    torch.testing.assert_close(sample_points(maps, points, size)[:, 0], value(points))


@properties
@given(pixels, grids, seeds)
def test_beyond_the_border_values_are_those_at_the_border(size, cells, seed):
    maps, points = draw(seed, 3, *cells), 3 * max(size) * draw(seed + 1, 9, 2)
    border = torch.minimum(points.clamp(min=-0.5), torch.tensor(size[::-1]) - 0.5)
    torch.testing.assert_close(sample_points(maps, points, size), sample_points(maps, border, size))


@properties
@given(pixels, grids, seeds)
def test_the_published_convention_is_a_padded_grid_sample(size, cells, seed):
    maps, points = draw(seed, 3, *cells), draw(seed + 1, 9, 2).sigmoid() * torch.tensor(size[::-1])
    places = 2 * points / (torch.tensor(size[::-1]) - 1) - 1
    expected = F.grid_sample(maps[None], places[None, None], align_corners=False)[0, :, 0].T
    torch.testing.assert_close(sample_points(maps, points, size, 'published'), expected)


def test_low_precision_is_interpolated_in_single():
    maps, points = torch.randn(3, 5, 7), 30 * torch.rand(20, 2)
    half = sample_points(maps.half(), points, (30, 40))
    assert half.dtype == torch.float16
    assert torch.equal(half, sample_points(maps.half().float(), points, (30, 40)).half())


# ---- maps of continued images


@properties
@given(st.tuples(st.integers(2, 9), st.integers(2, 9)), st.integers(2, 16), st.integers(0, 3), seeds)
def test_linear_functions_stay_what_they_are(cells, stride, beyond, seed):
    """Of the pixel, whatever the size of the image and of its continuation."""
    missing = draw(seed, 2).sigmoid().mul(stride).long().tolist()
    size = tuple(n * stride - less for n, less in zip(cells, missing, strict=True))
    continued = tuple(n + beyond for n in cells)
    given_map, _ = ramp(continued, tuple(n * stride for n in continued))
    expected, _ = ramp(cells, size)
    torch.testing.assert_close(fit_to_image(given_map, stride, size), expected)


@properties
@given(grids, st.integers(1, 16), st.integers(0, 3), seeds)
def test_multiples_of_the_stride_are_only_cut(cells, stride, beyond, seed):
    maps = draw(seed, 2, 3, *(n + beyond for n in cells), dtype=torch.float32)
    found = fit_to_image(maps, stride, tuple(n * stride for n in cells))
    assert torch.equal(found, maps[..., : cells[0], : cells[1]])


@properties
@given(pixels, st.integers(1, 64), seeds)
def test_every_map_of_a_batch_is_fitted_alike(size, stride, seed):
    cells = map_size(size, stride)
    maps = draw(seed, 3, 2, *cells, dtype=torch.float32)
    found = fit_to_image(maps, stride, size)
    assert found.shape == (3, 2, *cells)
    for i in range(3):
        assert torch.equal(found[i], fit_to_image(maps[i], stride, size))


@properties
@given(pixels, st.integers(1, 64))
def test_constants_stay_constant(size, stride):
    maps = torch.full((2, *map_size(size, stride)), 3.0)
    torch.testing.assert_close(fit_to_image(maps, stride, size), maps)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_is_kept(dtype):
    maps = torch.randn(2, 3, 4).to(dtype)
    found = fit_to_image(maps, 8, (20, 29))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), fit_to_image(maps.float(), 8, (20, 29)), rtol=0.05, atol=0.05)


def test_gradients_pass():
    maps = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fit_to_image(x, 8, (20, 29)), maps)


def test_a_map_must_cover_the_image():
    with pytest.raises(ValueError, match=r'3 x 4 cells of 8 pixels does not cover .* 25 x 32 pixels; it takes 4 x 4'):
        fit_to_image(torch.zeros(3, 4), 8, (25, 32))


@properties
@given(pixels, grids, seeds)
def test_resizing_to_the_same_size_is_the_identity(size, cells, seed):
    maps = draw(seed, 1, 2, *cells)
    assert resize(maps, cells) is maps
    assert resize(maps, size).shape[-2:] == size


# ---- a picture and its own crop


def positions(size, stride):
    """What a network that knows where each cell lies makes of an image continued to a multiple of 64 pixels."""
    y, x = ((torch.arange(-(-side // 64) * 64 // stride) + 0.5) * stride for side in size)
    places = torch.stack(torch.meshgrid(y, x, indexing='ij'))
    phases = torch.cat([places * torch.pi / (4 * stride), places * torch.pi / 128])  # the second are unique in 128 px
    return torch.cat([phases.cos(), phases.sin()])  # (8, h, w); the cosine falls off with the distance


@pytest.mark.parametrize('stride', [4, 8, 16, 32, 64])
@pytest.mark.parametrize('side', [96, 97, 100, 111])
def test_a_picture_matches_its_own_crop(side, stride):
    """Both ways, every column and row between the outermost centres, to a pixel or an eighth of the stride.

    Beyond these centres all pixels of a row (or column) are alike.
    """
    sizes = (128, 128), (side, side)
    maps = [fit_to_image(positions(size, stride), stride, size) for size in sizes]
    inside = torch.arange(stride // 2 + 1, side - stride // 2 - 1)
    points = torch.cartesian_prod(inside[::3], inside[::3])
    for source, target in ((0, 1), (1, 0)):
        matches = match_points(maps[source], maps[target], points, sizes[source], sizes[target])
        errors = (matches - points).abs().unflatten(0, (len(inside[::3]), -1))  # (x, y, 2)
        medians = torch.cat([errors[..., 0].median(1).values, errors[..., 1].median(0).values])
        assert medians.max() <= max(1, stride / 8)

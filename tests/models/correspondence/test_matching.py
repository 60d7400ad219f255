import pytest
import torch

from diffseg.models.correspondence import match_points


def test_an_image_matches_itself():
    maps = torch.randn(32, 12, 18)
    points = torch.tensor([[0, 0], [17, 11], [5, 7]])  # (x, y)
    assert match_points(maps, maps, points, (12, 18), (12, 18)).tolist() == points.tolist()


def test_a_shift_is_found_at_image_resolution():
    maps = torch.randn(32, 10, 10)
    shifted = torch.roll(maps, shifts=(2, 3), dims=(1, 2))  # y, x
    matches = match_points(maps, shifted, torch.tensor([[18, 14]]), (40, 40), (40, 40))
    assert (matches - torch.tensor([[18 + 12, 14 + 8]])).abs().max() <= 1


def test_bad_points_and_channels():
    maps = torch.randn(4, 6, 6)
    with pytest.raises(ValueError, match='inside the source image'):
        match_points(maps, maps, torch.tensor([[6, 0]]), (6, 6), (6, 6))
    with pytest.raises(ValueError, match='channels'):
        match_points(maps, maps[:2], torch.tensor([[0, 0]]), (6, 6), (6, 6))

"""Tests for diffseg.models.necks.concat."""

import pytest
import torch
from mmseg.registry import MODELS

from diffseg.models.necks import ConcatNeck


def make_maps() -> list[torch.Tensor]:
    """Two timesteps of layers with 3 and 5 channels in one level and 4 in a coarser one."""
    return [torch.randn(2, 2 * 3, 6, 10), torch.randn(2, 2 * 5, 3, 5), torch.randn(2, 2 * 4, 3, 5)]


def test_groups_and_resizes_to_the_finest_map_of_each_level():
    neck = MODELS.build({'type': 'ConcatNeck', 'levels': [[3, 5], [4]], 'timesteps': 2})
    maps = make_maps()
    fine, coarse = neck(maps)
    assert fine.shape == (2, neck.out_channels[0], 6, 10) == (2, 16, 6, 10)
    assert torch.equal(fine[:, :6], maps[0])
    assert torch.equal(coarse, maps[2])
    assert not list(neck.parameters())


def test_output_sizes():
    fine, coarse = ConcatNeck([[3, 5], [4]], 2, output_sizes=[8, (4, 2)])(make_maps())
    assert fine.shape[-2:] == (8, 8) and coarse.shape[-2:] == (4, 2)


def test_constant_maps_stay_constant():
    (out,) = ConcatNeck([[1, 1]])([torch.ones(1, 1, 4, 4), torch.full((1, 1, 3, 2), 2.0)])
    assert torch.equal(out[0, :, 1, 1], torch.tensor([1.0, 2.0])) and out.unique().numel() == 2


def test_normalized_maps_count_alike():
    maps = make_maps()
    (out,) = ConcatNeck([[3, 5, 4]], 2, normalize=True)([maps[0], 100 * maps[1], maps[2]])
    lengths = [x.norm(dim=1) for x in out.split([6, 10, 8], dim=1)]
    assert all(torch.allclose(length, torch.ones(2, 6, 10)) for length in lengths)
    assert torch.allclose(out[:, :6] * maps[0].norm(dim=1, keepdim=True), maps[0], atol=1e-6)


def test_maps_of_one_network_are_normalized_together():
    maps = make_maps()
    neck = ConcatNeck([[3, 5, 4]], 2, normalize=[[2, 1]], weights=[[0.5, 2]])
    (out,), (plain,) = neck(maps), ConcatNeck([[3, 5, 4]], 2)(maps)
    first, second = out.split([6 + 10, 8], dim=1)
    assert torch.allclose(first.norm(dim=1), torch.full((2, 6, 10), 0.5))
    assert torch.allclose(second.norm(dim=1), torch.full((2, 6, 10), 2.0))
    assert torch.allclose(first * 2 * plain[:, :16].norm(dim=1, keepdim=True), plain[:, :16], atol=1e-5)
    alone = ConcatNeck([[3, 5, 4]], 2, normalize=[[1, 1, 1]])(maps)
    assert torch.equal(alone[0], ConcatNeck([[3, 5, 4]], 2, normalize=True)(maps)[0])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'normalize': [[2]]}, r'normalize=\[\[2\]\] must be True, False, or .* add up to those of levels=\[\[3, 5, 4'),
        ({'normalize': [[2, 1]], 'weights': [[1.0]]}, r'weights=\[\[1.0\]\] must have a number for every part'),
        ({'weights': [[1.0, 1.0, 1.0]]}, 'are those of normalised maps; set normalize'),
    ],
)
def test_parts_and_weights_that_do_not_fit(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ConcatNeck([[3, 5, 4]], **options)


@pytest.mark.parametrize(
    ('levels', 'timesteps', 'message'),
    [
        ([[3, 5]], 2, 'got 3 maps'),
        ([[3, 4], [4]], 2, r'map 1 has 10 channels, .* 2 \* 4 = 8'),
        ([[3, 5], [4]], 1, 'map 0 has 6 channels'),
    ],
)
def test_inputs_that_do_not_match_the_levels(levels: list[list[int]], timesteps: int, message: str):
    with pytest.raises(ValueError, match=message):
        ConcatNeck(levels, timesteps)(make_maps())


def test_levels_out_of_order():
    fine_a, fine_b, coarse = make_maps()
    with pytest.raises(ValueError, match=r'from fine to coarse.*\(3, 5\), \(6, 10\)'):
        ConcatNeck([[4], [3, 5]], 2)([coarse, fine_a, fine_b])


def test_levels_may_go_from_coarse_to_fine_if_the_config_says_so():
    fine_a, fine_b, coarse = make_maps()
    first, second = ConcatNeck([[4], [3, 5]], 2, order='coarse-to-fine')([coarse, fine_a, fine_b])
    assert first.shape == (2, 8, 3, 5) and second.shape == (2, 16, 6, 10)
    with pytest.raises(ValueError, match=r'from coarse to fine.*\(6, 10\), \(3, 5\)'):
        ConcatNeck([[3, 5], [4]], 2, order='coarse-to-fine')([fine_a, fine_b, coarse])


def test_unknown_order():
    with pytest.raises(ValueError, match="order is 'up'; it is 'fine-to-coarse' or 'coarse-to-fine'"):
        ConcatNeck([[3, 5], [4]], 2, order='up')


def test_one_output_size_per_level():
    with pytest.raises(ValueError, match='one size per level'):
        ConcatNeck([[3, 5], [4]], 2, output_sizes=[8])


def test_layers_may_have_different_numbers_of_timesteps():
    neck = ConcatNeck([[6, 5], [2]], timesteps=[[1, 2], [4]])
    plain = ConcatNeck([[3, 5], [4]], timesteps=2)
    assert neck.out_channels == plain.out_channels
    maps = make_maps()
    assert all(torch.equal(x, y) for x, y in zip(neck(maps), plain(maps), strict=True))

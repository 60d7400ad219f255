"""Tests for diffseg.models.necks.upsampling: properties of the attention, and the image that the backbone passes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from tiny_mmseg import backbone_config

from diffseg.models.necks import AggregationNeck, UpsamplingNeck
from diffseg.models.necks.upsampling import GuidedUpsampling

OPTIONS = {'levels': [[3, 16], [5]], 'timesteps': 2, 'out_channels': 16, 'num_groups': 2}


def make_inputs() -> list[torch.Tensor]:
    """Maps of strides 8 and 16, and an image of which the last cells are cut."""
    image = torch.rand(2, 3, 43, 78) * 2 - 1
    return [torch.randn(2, 6, 6, 10), torch.randn(2, 32, 3, 5), torch.randn(2, 10, 3, 5), image]


@pytest.mark.parametrize('factor', [2, 3])
def test_values_are_convex_combinations_of_their_window(factor):
    upsample, x, image = GuidedUpsampling(factor), torch.randn(2, 4, 5, 7), torch.rand(2, 3, 37, 53)
    y = upsample(x, image)
    assert y.shape == (2, 4, 5 * factor, 7 * factor)
    torch.testing.assert_close(upsample(torch.full_like(x, 3.5), image), torch.full_like(y, 3.5))
    high = F.interpolate(F.max_pool2d(x, 3, 1, 1), scale_factor=factor)
    low = F.interpolate(-F.max_pool2d(-x, 3, 1, 1), scale_factor=factor)
    assert ((y <= high + 1e-6) & (y >= low - 1e-6)).all()
    impulse = torch.zeros(1, 1, 5, 7)
    impulse[..., 2, 3] = 1
    reach = upsample(impulse, image[:1])[0, 0].nonzero()
    assert reach.min(0).values.tolist() == [factor, 2 * factor]
    assert reach.max(0).values.tolist() == [4 * factor - 1, 5 * factor - 1]


@pytest.mark.parametrize('dims', [(-1,), (-2,), (-2, -1)])
def test_mirrored_inputs_give_the_mirrored_result(dims):
    upsample, x, image = GuidedUpsampling(2), torch.randn(2, 4, 5, 7), torch.rand(2, 3, 37, 53)
    torch.testing.assert_close(upsample(x.flip(dims), image.flip(dims)), upsample(x, image).flip(dims))


def test_it_follows_the_edge_of_the_image():
    """Where a border in the image cuts a coarse cell, the fine cells on its two sides take values of their own side."""
    image = torch.full((1, 3, 16, 32), -1.0)
    image[..., 12:] = 1  # in the middle of the second of four coarse cells
    x = (torch.arange(4.0) > 1).float().expand(1, 1, 2, 4)
    guided, blind = (GuidedUpsampling(2)(x, picture)[0, 0, 1] for picture in (image, torch.zeros_like(image)))
    assert blind[2] < blind[3] < 0.5 < guided[3] and guided[2] < 0.1


def test_levels_are_those_of_the_aggregation_neck_upsampled():
    neck, plain, inputs = UpsamplingNeck(**OPTIONS), AggregationNeck(**OPTIONS), make_inputs()
    plain.load_state_dict({name: x for name, x in neck.state_dict().items() if 'upsampling' not in name})
    levels = neck(inputs)
    assert [tuple(x.shape[-2:]) for x in levels] == [(12, 20), (6, 10)]
    for upsample, ours, theirs in zip(neck.upsampling, levels, plain(inputs[:-1]), strict=True):
        torch.testing.assert_close(ours, upsample(theirs, inputs[-1]))
    before = {name: parameter.detach().clone() for name, parameter in neck.named_parameters()}
    sum(x.square().mean() for x in levels).backward()
    torch.optim.SGD(neck.parameters(), lr=1.0).step()
    assert [name for name, parameter in neck.named_parameters() if torch.equal(parameter, before[name])] == []


@pytest.mark.parametrize('inputs', [make_inputs()[:-1], [*make_inputs()[:-1], torch.zeros(2, 10, 3, 5)]])
def test_without_the_image(inputs):
    with pytest.raises(ValueError, match='takes 3 and the image; set output_image=True'):
        UpsamplingNeck(**OPTIONS)(inputs)


def test_a_factor_that_does_nothing():
    with pytest.raises(ValueError, match='factor=1 does not upsample'):
        UpsamplingNeck(**OPTIONS, factor=1)


def test_the_backbone_passes_the_image_beside_its_maps(shallow_sd15: Path, tmp_path: Path):
    config = backbone_config(shallow_sd15, layers=['up-level0-repeat0-res-out'], timesteps=[50], input_size=64)
    plain, backbone = (MODELS.build({**config, **o}) for o in ({}, {'output_image': True, 'cache': str(tmp_path)}))
    image = torch.rand(1, 3, 43, 78) * 2 - 1
    (expected,) = plain(image)
    for _ in range(2):  # computed, cached
        x, passed = backbone(image)
        assert torch.equal(passed, image)
        torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-2)
    assert backbone.cache.counts.hits == 1 and backbone.fingerprint == plain.fingerprint
    assert backbone.channels == plain.channels
    with pytest.raises(ValueError, match='output_image is not for members'):
        MODELS.build({'type': 'EnsembleBackbone', 'backbones': [{**config, 'output_image': True}]})

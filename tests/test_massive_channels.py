"""Tests for diffseg.massive_channels."""

import pytest
import torch

from diffseg.massive_channels import channel_magnitudes, raw_layers


def test_planted_channels_come_first_with_the_share_of_their_images():
    magnitudes = 1 + 0.1 * torch.rand(4, 33)
    magnitudes[:, 7] = 100
    magnitudes[:1, 20] = 50
    first, second, *others = channel_magnitudes(magnitudes, times=10)
    assert (first.channel, first.share) == (7, 1.0) and 90 < first.times < 100
    assert (second.channel, second.share) == (20, 0.25) and 10 < second.times < 15
    assert len(others) == 31 and all(share == 0 and times < 1.2 for _, times, share in others)


def test_multiples_of_the_median():
    (row,) = torch.tensor([[1.0, 2.0, 3.0, 40.0, 2.0]]).unsqueeze(0)
    found = {channel: times for channel, times, _ in channel_magnitudes(row)}
    assert found == {0: 0.5, 1: 1, 2: 1.5, 3: 20, 4: 1}
    with pytest.raises(ValueError, match='times is 1; massive channels exceed'):
        channel_magnitudes(row, times=1)


def test_raw_layers_of_modulated_ones():
    layers = ['vit-block3-mod@0.26', 'vit-block3-attn2-mod@300', 'vit-block4-mod@260', 'vit-block5-out@260']
    assert raw_layers({'layers': layers}) == ['vit-block3-in', 'vit-block4-in']
    with pytest.raises(ValueError, match='reads no modulated features'):
        raw_layers({'layers': ['vit-block5-out'], 'timesteps': [260]})

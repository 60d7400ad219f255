"""The table of the largest channels."""

import numpy as np
import torch
from PIL import Image
from torch import nn


def test_the_largest_channels_come_first(load_tool, tiny_pipeline, tmp_path, monkeypatch, capsys):
    tool = load_tool('analysis/channel_magnitudes')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(tmp_path / 'a.png')
    build = tool.DiffusionExtractor

    def enlarge(module: nn.Module, _, output: torch.Tensor) -> torch.Tensor:
        scale = torch.ones(output.shape[1])
        scale[3], scale[5] = 1000, -100
        return output * scale[:, None, None]

    def build_with_large_channels(*args, **kwargs):
        extractor = build(*args, **kwargs)
        extractor.network.conv_in.register_forward_hook(enlarge)
        return extractor

    monkeypatch.setattr(tool, 'DiffusionExtractor', build_with_large_channels)
    options = f'--model {tiny_pipeline} --layers unet-after-conv-in --timesteps 50 300 --channels 2 --device cpu'
    assert tool.main([str(tmp_path), *options.split()]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ['activation', 't'] and [row.split()[:2] for row in rows] == [
        ['unet-after-conv-in', '50'],
        ['unet-after-conv-in', '300'],
    ]
    for row in rows:
        channels, ratios = row.split()[2::3], [float(ratio) for ratio in row.split()[4::3]]
        assert channels == ['3', '5'] and ratios[0] > 300 and 30 < ratios[1] < ratios[0]


def test_ratios_to_the_median(load_tool):
    means = torch.tensor([[1.0, 2.0, 3.0, 40.0, 2.0], [4.0, 4.0, 4.0, 4.0, 4.0]])
    ratios = load_tool('analysis/channel_magnitudes').ratios_to_median(means)
    assert ratios.tolist() == [[0.5, 1, 1.5, 20, 1], [1, 1, 1, 1, 1]]


def test_errors_are_told(load_tool, tiny_pipeline, tmp_path, capsys):
    (tmp_path / 'a.png').write_text('no picture')
    options = f'--model {tiny_pipeline} --layers mid-vit-out --timesteps 50 --device cpu'
    assert load_tool('analysis/channel_magnitudes').main([str(tmp_path), *options.split()]) == 2
    assert 'cannot be read as an image' in capsys.readouterr().err

"""The table of the largest channels."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from mmengine.config import Config
from mmseg.registry import MODELS
from PIL import Image
from torch import nn

import diffseg.models  # noqa: F401


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
    options = (
        f'--model {tiny_pipeline} --times 50 --layers unet-after-conv-in --timesteps 50 300 --channels 2 --device cpu'
    )
    assert tool.main([str(tmp_path), *options.split()]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ['activation', 't'] and [row.split()[:2] for row in rows] == [
        ['unet-after-conv-in', '50'],
        ['unet-after-conv-in', '300'],
    ]
    for row in rows:
        channels, ratios = row.split()[2::4], [float(ratio) for ratio in row.split()[4::4]]
        assert channels == ['3', '5'] and ratios[0] > 300 and 30 < ratios[1] < ratios[0]
        assert row.split()[5] == '(100%)'


@pytest.fixture
def config(pipeline_folder, tmp_path) -> Path:
    """A config that reads modulated features of a transformer whose second block has two massive channels."""
    folder = Path(shutil.copytree(pipeline_folder('pixart-sigma'), tmp_path / 'model'))
    network = PixArtTransformer2DModel.from_pretrained(folder, subfolder='transformer')
    with torch.no_grad():  # what a block adds to a stream of tokens
        network.transformer_blocks[0].ff.net[2].bias[[5, 17]] += torch.tensor([3000.0, -2000.0])
    network.save_pretrained(folder / 'transformer')
    backbone = {'type': 'DiffusionBackbone', 'model': str(folder), 'prompt': 'a horse'}
    backbone |= {'layers': ['vit-block1-mod@260', 'vit-block0-out@500']}
    (tmp_path / 'base.py').write_text(f'model = dict(backbone={backbone!r})\n')
    for i, size in enumerate(((64, 96), (40, 56))):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f'{i}.png')
    return tmp_path / 'base.py'


def test_massive_channels_are_written_into_a_config(load_tool, config, tmp_path, capsys):
    out = tmp_path / 'configs' / 'discarding.py'
    tool = load_tool('analysis/channel_magnitudes')
    assert tool.main([str(tmp_path), '--config', str(config), '--out', str(out), '--device', 'cpu']) == 0
    _, *rows, last = capsys.readouterr().out.splitlines()
    assert [row.split()[:3] for row in rows] == [['vit-block1-in', t, '5'] for t in ('260', '500')]
    assert last == f'{out} discards 5, 17'
    backbone = Config.fromfile(out).model.backbone
    assert backbone.discard == [5, 17] and backbone.layers[0] == 'vit-block1-mod@260'

    MODELS.build({**backbone, 'layers': ['vit-block1-mod'], 'timesteps': [260]})(torch.zeros(1, 3, 32, 32))
    none = [str(tmp_path), '--config', str(config), '--out', str(out), '--device', 'cpu', '--times', '1e9']
    assert tool.main(none) == 2 and 'lower --times' in capsys.readouterr().err


def test_errors_are_told(load_tool, tiny_pipeline, tmp_path, capsys):
    (tmp_path / 'a.png').write_text('no picture')
    options = f'--model {tiny_pipeline} --layers mid-vit-out --timesteps 50 --device cpu'
    assert load_tool('analysis/channel_magnitudes').main([str(tmp_path), *options.split()]) == 2
    assert 'cannot be read as an image' in capsys.readouterr().err

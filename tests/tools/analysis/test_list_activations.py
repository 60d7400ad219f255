"""The list of activations: complete, with the true shapes, and copied from a config as the backbone gives them."""

from pathlib import Path

import pytest
import tiny
import torch

from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.sites import sites

ROOT = Path(__file__).resolve().parents[3]
LAYERS = ['up-level1-repeat1-vit-block0-cross-q', 'dift-2']


@pytest.fixture(scope='module')
def main(load_tool):
    return load_tool('analysis/list_activations').main


def write_config(folder: Path, **backbone) -> str:
    path = folder / 'config.py'
    path.write_text(f'model = {dict(type="EncoderDecoder", backbone=dict(type="DiffusionBackbone", **backbone))}')
    return str(path)


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


PIPELINES = {'tiny_pipeline': tiny.unet, 'tiny_sdxl_pipeline': tiny.sdxl_unet, 'tiny_pixel_pipeline': tiny.pixel_unet}


@pytest.mark.parametrize('pipeline', PIPELINES)
def test_lists_every_site_without_weights(main, request, tmp_path, capsys, pipeline):
    """The folder given holds configurations only."""
    folder = request.getfixturevalue(pipeline)
    for config in folder.glob('*/config.json'):
        (tmp_path / config.parent.name).mkdir()
        (tmp_path / config.parent.name / config.name).write_text(config.read_text())
    assert main([str(tmp_path), '--size', '128x192']) == 0
    header, *table = rows(capsys.readouterr().out)
    assert header == ['name', 'channels', 'stride', 'size', 'at', '128x192']
    expected = sites(PIPELINES[pipeline]()).values()
    assert [row[0] for row in table] == [site.name for site in expected]
    assert [row[1] for row in table] == [str(site.channels or 'keys') for site in expected]
    assert [row[3] for row in table] == ['x'.join(map(str, site.size(128, 192))) for site in expected]


def test_preset_at_its_own_size(main, capsys):
    assert main(['sd15', '--filter', 'mid-vit-block0-*']) == 0
    header, *table = rows(capsys.readouterr().out)
    assert header[-1] == '512x512'
    assert len(table) == 8
    assert ['mid-vit-block0-ffn-inner', '5120', '64', '8x8'] in table
    assert ['mid-vit-block0-cross-map', 'keys', '64', '8x8'] in table


def test_aliases_of_a_preset_of_pixel_space(main, capsys):
    assert main(['ddpm-lsun-horse', '--filter', 'adm-12']) == 0
    header, row = rows(capsys.readouterr().out)
    assert header[-1] == '256x256' and row == ['up-level4-repeat0-res-out', '256', '2', '128x128']


def test_config_gives_what_the_extractor_gives(main, tiny_pipeline, tmp_path, capsys):
    timesteps = [50, 200, 400]
    config = write_config(tmp_path, model=str(tiny_pipeline), layers=LAYERS, timesteps=timesteps, input_size=[64, 96])
    assert main([config]) == 0
    *table, in_channels = capsys.readouterr().out.splitlines()
    with torch.no_grad():
        read = DiffusionExtractor(tiny_pipeline, LAYERS, timesteps)(torch.zeros(1, 3, 64, 96))
    maps = {name: value.flatten(1, 2).shape for name, value in read.items()}  # (B, T*C, h, w)
    printed = [line.split() for line in table[2:]]
    assert [(row[0], row[1], row[3]) for row in printed] == [
        (name, str(shape[1]), f'{shape[2]}x{shape[3]}') for name, shape in maps.items()
    ]
    assert in_channels == f'in_channels={[shape[1] for shape in maps.values()]}'


def test_config_with_timesteps_of_a_layers_own(main, tiny_pipeline, tmp_path, capsys):
    layers = ['dift-2@50', f'{LAYERS[0]}@200+50', 'dift-2@400', 'mid-vit-out']
    config = write_config(tmp_path, model=str(tiny_pipeline), layers=layers, timesteps=[50, 200, 400])
    assert main([config, '--filter', 'up-*']) == 0
    title, _, *table, in_channels = capsys.readouterr().out.splitlines()
    assert title.endswith('4 maps, timesteps 50, 200, 400')
    assert [line.split()[:2] for line in table] == [
        ['up-level2-upsampler-out@50', '32'],
        [f'{LAYERS[0]}@200+50', '128'],
        ['up-level2-upsampler-out@400', '32'],
    ]
    assert in_channels == 'in_channels=[32, 128, 32]'


def test_config_with_attention(main, tiny_pipeline, tmp_path, capsys):
    config = write_config(
        tmp_path, model=str(tiny_pipeline), layers=['mid-vit-out'], timesteps=[50], attention_maps=['up_cross']
    )
    assert main([config, '--size', '64']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ['attn', 'keys', '8', '8x8']  # and no list of channels


@pytest.mark.parametrize(
    'stem',
    [
        'sd15-t50_agg-upernet_1xb2-80k_ade20k-512x512',
        'sd15-vpd-t1_fpn_8xb2-80k_ade20k-512x512',
        'sdxl-t50_agg-upernet_1xb2-80k_cityscapes-1024x1024',
    ],
)
def test_shipped_configs_are_listed(main, stem, capsys):
    """Their typed channels are the model's."""
    mmengine = pytest.importorskip('mmengine')
    path = ROOT / 'configs' / 'segmentation' / f'{stem}.py'
    backbone = mmengine.Config.fromfile(path, import_custom_modules=False).model.backbone
    assert main([str(path)]) == 0
    channels = [count * len(backbone.timesteps) for count in backbone.channels]
    assert capsys.readouterr().out.splitlines()[-1] == f'in_channels={channels}'


def test_errors(main, tiny_pipeline, tmp_path, capsys):
    for argv, message in [
        ([str(tiny_pipeline), '--filter', 'up-*-cross-k'], '-cross-q'),
        ([str(tiny_pipeline), '--filter', 'up_level1-upsampler-out'], 'up-level1-upsampler-out'),
        ([str(tmp_path / 'nowhere')], 'nowhere'),
        ([write_config(tmp_path, model=str(tiny_pipeline), layers=['mid-out'], timesteps=[1])], 'mid-vit-out'),
    ]:
        assert main(argv) == 2
        captured = capsys.readouterr()
        assert captured.out == ''
        assert captured.err.startswith('error: ')
        assert message in captured.err
    (tmp_path / 'other.py').write_text("model = dict(backbone=dict(type='ResNet'))")
    assert main([str(tmp_path / 'other.py')]) == 2
    assert 'no DiffusionBackbone' in capsys.readouterr().err

"""The tools that read features, with transformers: whole pipelines of several families, and sigmas as timesteps."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import read_image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('images') / 'a.png'
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((96, 64), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope='module')
def pairs(load_tool, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('pairs')
    load_tool('toy/make_data').main([str(folder), '--train', '0', '--test', '0', '--pairs', '1'])
    return folder / 'SPair-toy'


def stored_timesteps(path: str | Path) -> list[float]:
    with safe_open(path, 'pt') as file:
        return json.loads(file.metadata()['timesteps'])


def test_features_at_a_sigma_are_those_at_its_index(load_tool, pipeline_folder, image, tmp_path, capsys):
    folder, layer = pipeline_folder('flux'), 'vit-block2-mod'
    fixed = (
        f'{image} --model {folder} --layers {layer} --out {tmp_path} --save-dtype float32 --prompt horse --device cpu'
    )
    main = load_tool('extract_features').main
    assert main([*fixed.split(), '--timesteps', '0.26']) == 0
    expected = DiffusionExtractor(folder, [layer], [260], prompt='horse')(read_image(image)[None])[layer][0]
    path = tmp_path / 'a.png.safetensors'
    torch.testing.assert_close(load_file(path)[layer], expected)
    assert stored_timesteps(path) == [260]
    capsys.readouterr()
    assert main([*fixed.split(), '--timesteps', '260']) == 0
    assert '0 written, 1 already there' in capsys.readouterr().out
    assert main([*fixed.split(), '--timesteps', '1']) == 2
    assert 'may be a sigma or an index' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*fixed.split(), '--timesteps', 'noon'])
    assert "'noon' is no timestep; write an index such as 261, or for rectified flow a sigma" in capsys.readouterr().err


def test_pictures_of_features(load_tool, pipeline_folder, image, tmp_path, capsys):
    fixed = f'{image} --model {pipeline_folder("pixart-sigma")} --timesteps 50 --out {tmp_path}/pca.png --device cpu'
    assert (
        load_tool('analysis/visualize').main([*fixed.split(), '--layers', 'vit-block*-self-q', 'transformer-out']) == 0
    )
    assert '1 images x 3 maps' in capsys.readouterr().out
    assert Image.open(tmp_path / 'pca.png').size[0] > 4 * 192


def test_points_of_an_image_are_found_in_itself(load_tool, pipeline_folder, image, tmp_path, capsys):
    fixed = f'{image} {image} --model {pipeline_folder("flux")} --timesteps 0.26 --out {tmp_path}/m.png --device cpu'
    points = [(8, 8), (72, 40)]
    options = ['--layers', 'vit-block1-mod', '--points', *(f'{x},{y}' for x, y in points)]
    assert load_tool('apply/match').main([*fixed.split(), *options]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    for row, point in zip(rows, points, strict=True):
        found = float(row['target_x']), float(row['target_y'])
        assert float(row['similarity']) == pytest.approx(1, abs=1e-3)
        assert np.hypot(*np.subtract(found, point)) < 8  # half a cell


def test_layers_are_scored_at_sigmas(load_tool, pipeline_folder, pairs, capsys):
    arguments = [str(pipeline_folder('flux')), str(pairs), '--layers', 'vit-block*-mod', '--timestep', '0.26', '500']
    assert load_tool('analysis/score_layers').main([*arguments, '--size', '64', '--random', '--device', 'cpu']) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[-2:] == ['0.26', '500'] and len(rows) == 4 + 1
    assert all(0 <= float(value) <= 100 for row in rows for value in row.split()[-2:])


@pytest.mark.parametrize(
    ('kind', 'options', 'timesteps', 'guidance'),
    [
        ('flux', '--steps 2 --mu 1 --embedded-guidance 2', [1000, 731.059], 1),  # shifted: e / (e + 1)
        ('dit', '--steps 2 --spacing trailing --guidance 4 --prompt 1', [999, 499], 4),
    ],
)
def test_images_are_generated(load_tool, pipeline_folder, tmp_path, kind, options, timesteps, guidance):
    arguments = [str(pipeline_folder(kind)), '--layers', 'vit-block1-out', '--size', '64', '--out', str(tmp_path)]
    arguments += ['--device', 'cpu', '--timesteps', *map(str, timesteps), *options.split()]
    assert load_tool('apply/generate').main(arguments) == 0
    path = next(tmp_path.glob('*.png'))
    assert Image.open(path).size == (64, 64)
    assert load_file(f'{path}.safetensors')['vit-block1-out'].shape[:2] == (2, 16 if kind == 'dit' else 32)
    assert stored_timesteps(f'{path}.safetensors') == timesteps
    configuration = json.loads((tmp_path / 'config.json').read_text())
    assert configuration['trajectory']['guidance'] == guidance
    assert configuration.get('embedded_guidance') == (2 if kind == 'flux' else None)


def test_a_search_over_blocks_and_sigmas(load_tool, pipeline_folder, pairs, tmp_path):
    folder, layer = pipeline_folder('flux'), 'vit-block1-mod'
    backbone = dict(_delete_=True, type='DiffusionBackbone', model=str(folder), layers=[layer], timesteps=[0.26])
    data = {'data_root': str(pairs), 'categories': ['horse']}
    loaders = ''.join(f'{name}_dataloader = dict(dataset={data})\n' for name in ('train', 'test'))
    config = tmp_path / 'config.py'
    model = f'model = dict(backbone={backbone}, neck=dict(levels=[[32]]))\n'
    config.write_text(f'_base_ = {str(ROOT / "configs/search/pairs.py")!r}\n{model}{loaders}')
    grid = ['--layers', 'vit-block*-mod', 'transformer-out', '--timesteps', '0.26', '500', '--k', '2']
    assert load_tool('search').main([str(config), *grid, '--out', str(tmp_path), '--device', 'cpu']) == 0
    rows = list(csv.DictReader((tmp_path / 'ranking.csv').open()))
    assert {row['timestep'] for row in rows} == {'260', '500'} and len(rows) == 5 * 2
    configured = json.loads((tmp_path / 'selected.json').read_text())['configured']
    assert configured['candidates'] == [f'{layer}@260']
    selected = Config.fromfile(tmp_path / 'selected.py').model.backbone
    assert all(name.endswith(('@260', '@500')) for name in selected.layers)


def test_a_homography(load_tool, pipeline_folder, tmp_path, capsys):
    load_tool('toy/make_hpatches').main([str(tmp_path), '--sequences', '1', '--size', '64', '96'])
    source = tmp_path / 'HPatches-toy/i_scene00/1.ppm'
    backbone = dict(model=str(pipeline_folder('pixart-sigma')), layers=['vit-block1-out'], timesteps=[50])
    config = tmp_path / 'config.py'
    base = str(ROOT / 'configs/hpatches/toy/_base_.py')
    config.write_text(f'_base_ = {base!r}\nmodel = dict(backbone={backbone})\n')
    arguments = [str(config), str(source), str(source), '--out', str(tmp_path / 'h.png'), '--device', 'cpu']
    assert load_tool('apply/homography').main(arguments) == 0
    matrix = np.array([line.split() for line in capsys.readouterr().out.splitlines()[1:4]], float)
    np.testing.assert_allclose(matrix, np.eye(3), atol=0.1)

import json
from pathlib import Path

import pytest
import torch

from diffseg.diffusion.extractor import DiffusionExtractor


@pytest.fixture
def pairs(load_tool, tmp_path):
    load_tool('toy/make_data').main([str(tmp_path), '--train', '0', '--test', '0', '--pairs', '1'])
    return tmp_path / 'SPair-toy'


def test_every_layer_is_scored(load_tool, pairs, tiny_pipeline, capsys):
    layers = ['up-level3-repeat0-vit-block0-self-k', 'dift-1']
    score = load_tool('analysis/score_layers')
    score.main([str(tiny_pipeline), str(pairs), '--layers', *layers, '--random', '--size', '32'])
    header, *rows = capsys.readouterr().out.splitlines()
    assert 'PCK@0.1-bbox/image' in header
    assert {row.split()[0] for row in rows} == {layers[0], 'up-level1-upsampler-out'}
    assert all(0 <= float(value) <= 100 for row in rows for value in row.split()[1:])


def test_a_grid_of_timesteps_and_seeds(load_tool, pairs, tiny_pipeline, capsys):
    layers = ['up-level3-*-out', 'unet-in']
    options = ['--layers', *layers, '--timestep', '0', '900', '--size', '32', '--best', '2']
    load_tool('analysis/score_layers').main([str(tiny_pipeline), str(pairs), *options, '--seeds', '2'])
    header, *rows, highest = capsys.readouterr().out.splitlines()
    assert header.split()[-5:] == ['at', 't', '|', '0', '900'] and len(rows) == 2
    for row in rows:
        figures, _, by_timestep = row.partition('|')
        _, image, _, deviation, *_, t = figures.split()
        values = dict(zip(['0', '900'], map(float, by_timestep.split()), strict=True))
        assert float(image) == max(values.values()) == values[t] and float(deviation) >= 0
    assert float(highest.split()[-2]) >= float(rows[0].split()[-2])


def test_modulated_features_of_a_transformer(load_tool, pairs, capsys):
    tool, folder = load_tool('analysis/score_layers'), Path(__file__).parents[3] / 'demo/tiny-dit'
    tables = []
    for options in ([], ['--discard', *map(str, range(0, 190))], ['--random']):
        tool.main([str(folder), str(pairs), '--layers', 'vit-block3-mod', '--timestep', '150', '0.5', *options])
        tables.append(capsys.readouterr().out.splitlines())
    assert all(header.split()[-3:] == ['|', '150', '0.5'] for header, *_ in tables)
    assert len({row for _, row, _ in tables}) == 3


def test_figures_of_a_grid(load_tool):
    scores = {'a': [[(10, 20), (20, 20)], [(30, 1), (40, 3)]], 'b': [[(50, 50), (50, 50)], [(0, 0), (0, 0)]]}
    _, b, a, highest = load_tool('analysis/score_layers').table(scores, [50, 100], best=5).splitlines()
    assert a.split() == ['a', '35.00', '±', '7.07', '2.00', '±', '1.41', '100', '|', '15.00', '35.00']
    assert b.split() == ['b', '50.00', '±', '0.00', '50.00', '±', '0.00', '50', '|', '50.00', '0.00']
    assert highest.split()[-2:] == ['50.00', '35.00']


def test_an_image_matches_itself(load_tool, pairs, tiny_pipeline):
    tool = load_tool('analysis/score_layers')
    pair = json.loads(next((pairs / 'PairAnnotation/test').glob('*.json')).read_text())
    same = {**pair, **{f'trg_{key}': pair[f'src_{key}'] for key in ('imname', 'imsize', 'kps', 'bndbox')}}
    extractor = DiffusionExtractor(tiny_pipeline, ['unet-in'], [0])
    maps = [tool.extract(extractor, path, None, 'cpu') for path in tool.image_paths(pairs, same)]
    hits = tool.match_pair(same, maps, 'cpu')
    assert hits['unet-in'].dtype == torch.bool
    assert hits['unet-in'].all()


def test_each_image_is_encoded_once(load_tool, pairs, tiny_pipeline, capsys, monkeypatch):
    tool = load_tool('analysis/score_layers')
    for path in (pairs / 'PairAnnotation/test').glob('*.json'):  # each pair in both directions
        pair = json.loads(path.read_text())
        sides = {'src': 'trg', 'trg': 'src'}
        swapped = {f'{sides.get(k[:3], k[:3])}{k[3:]}' if k[:4] in ('src_', 'trg_') else k: v for k, v in pair.items()}
        path.with_stem(f'{path.stem}-swapped').write_text(json.dumps(swapped))
    printed, encoded = {}, {}
    extract = tool.extract
    monkeypatch.setattr(tool, 'extract', lambda *args: encoded[store].append(args[1]) or extract(*args))
    for store in ('1', '0'):
        encoded[store] = []
        options = ['--layers', 'dift-1', '--size', '32', '--store-gb', store, '--dtype', 'bfloat16', '--device', 'cpu']
        assert tool.main([str(tiny_pipeline), str(pairs), *options]) == 0
        printed[store] = capsys.readouterr().out
    assert printed['0'] == printed['1']
    assert len(encoded['1']) == len(set(encoded['1'])) == 8 < len(encoded['0'])


@pytest.mark.parametrize(('layer', 'message'), [('dift-1', 'no pairs in'), ('adm-*', "no layer matches 'adm-*'")])
def test_what_is_missing_is_named(load_tool, tmp_path, tiny_pipeline, capsys, layer, message):
    assert load_tool('analysis/score_layers').main([str(tiny_pipeline), str(tmp_path), '--layers', layer]) == 2
    assert f'error: {message}' in capsys.readouterr().err

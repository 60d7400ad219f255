import csv
import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

import diffseg.search.pck as search_pck
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.evaluation import pck
from diffseg.search.engine import Store

ROOT = Path(__file__).resolve().parents[2]
GRID = ['--layers', 'up-level2-repeat0-vit-out', 'practical', '--timesteps', '50', '350']
PAIRS = [*GRID, '--dtype', 'float32']
CATEGORIES = ['dog', 'horse']  # of the pairs
NAMES = {'ranking.csv', 'ranking.json', 'heatmap.png', 'selected.json', 'selected.py'}


@pytest.fixture(scope='module')
def search(load_tool):
    return load_tool('search').main


@pytest.fixture(scope='module')
def config(load_tool, tmp_path_factory):
    """`config(base)`: a config that inherits one of the shipped ones, with data of its own."""
    folder = tmp_path_factory.mktemp('search')
    load_tool('toy/make_data').main([str(folder), '--train', '6', '--test', '1', '--pairs', '1'])

    def write(base: str) -> str:
        data = {'data_root': str(folder / 'toy')}
        if 'recipe' not in base:
            data = {'data_root': str(folder / 'SPair-toy'), 'categories': CATEGORIES}
        path = folder / f'{Path(base).stem}.py'
        loaders = ''.join(f'{name}_dataloader = dict(dataset={data})\n' for name in ('train', 'val', 'test'))
        path.write_text(f'_base_ = {str(ROOT / base)!r}\n{loaders}')
        return str(path)

    return write


@pytest.fixture(scope='module')
def pairs(config):
    return config('configs/search/pairs.py')


@pytest.fixture(scope='module')
def undisturbed(search, pairs, tmp_path_factory):
    """A finished search in which nothing is rounded or projected."""
    out = tmp_path_factory.mktemp('undisturbed')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_pck, 'KEPT', torch.float32)
        assert search([pairs, *PAIRS, '--out', str(out)]) == 0
        yield out


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_what_a_search_leaves_behind(undisturbed):
    outputs = files(undisturbed)
    assert {name for name in outputs if '/' not in name} == NAMES
    rows = list(csv.DictReader((undisturbed / 'ranking.csv').open()))
    scores = [float(row['PCK@0.1-bbox/image']) for row in rows]
    assert len(rows) == 5 * 2 and scores == sorted(scores, reverse=True) and scores[-1] < scores[0]
    assert json.loads(outputs['ranking.json'])['ranking'][0]['activation'] == rows[0]['activation']
    selected = json.loads(outputs['selected.json'])
    steps = [step['PCK@0.1-bbox/image'] for step in selected['steps']]
    assert steps == sorted(steps) and 1 <= len(selected['selected']) <= 4
    assert len(selected['configured']['candidates']) == 4 and all(
        name.endswith('@50') for name in selected['configured']['candidates']
    )


def test_a_search_that_is_stopped_goes_on(search, pairs, undisturbed, tmp_path, monkeypatch):
    write = Store.write
    for stop_after in (1, 2):  # in either stage
        written = []

        def interrupted(self, draw, reduction, written=written, stop_after=stop_after):
            if len(written) == stop_after:
                raise KeyboardInterrupt
            written.append(draw)
            write(self, draw, reduction)

        monkeypatch.setattr(Store, 'write', interrupted)
        with pytest.raises(KeyboardInterrupt):
            search([pairs, *PAIRS, '--out', str(tmp_path)])
    monkeypatch.setattr(Store, 'write', write)
    assert search([pairs, *PAIRS, '--out', str(tmp_path)]) == 0
    assert files(tmp_path) == files(undisturbed)


def test_shards_make_a_whole(search, pairs, undisturbed, tmp_path, capsys):
    for shard in ('1/2', '0/2'):
        assert search([pairs, *PAIRS, '--out', str(tmp_path), '--shard', shard]) == 0
    assert '1 samples are left' in capsys.readouterr().out
    assert search([pairs, *PAIRS, '--out', str(tmp_path)]) == 0
    assert files(tmp_path) == files(undisturbed)


def test_figures_are_those_of_score_layers(load_tool, pairs, undisturbed):
    cfg = Config.fromfile(pairs)
    rows = list(csv.DictReader((undisturbed / 'ranking.csv').open()))
    extractor = DiffusionExtractor(cfg.model.backbone.model, sorted({row['activation'] for row in rows}), [50, 350])
    tool, data = load_tool('analysis/score_layers'), Path(cfg.train_dataloader.dataset.data_root)
    hits = []
    for path in (data / 'PairAnnotation/trn').glob('*.json'):
        if path.stem.rpartition(':')[2] in CATEGORIES:
            pair = json.loads(path.read_text())
            activations = [tool.extract(extractor, image, None, 'cpu') for image in tool.image_paths(data, pair)]
            hits.append(tool.match_pair(pair, activations, 'cpu'))
    for row in rows:
        correct = [pair[row['activation']][extractor.timesteps.index(int(row['timestep']))] for pair in hits]
        assert float(row['PCK@0.1-bbox/image']) == pytest.approx(pck(correct, 'image'), abs=1e-4)


def test_selected_pairs_config_scores_what_the_search_says(load_tool, undisturbed, tmp_path):
    options = ['test_dataloader.dataset.split=trn', 'test_evaluator.out_file=None']
    args = [str(undisturbed / 'selected.py'), '--work-dir', str(tmp_path), '--cfg-options', *options]
    metrics = load_tool('test').main(args)
    expected = json.loads((undisturbed / 'selected.json').read_text())['steps'][-1]
    assert metrics['PCK@0.1-bbox/image'] == pytest.approx(expected['PCK@0.1-bbox/image'], abs=1e-3)


def test_selected_segmentor_is_built(search, config, tmp_path):
    path = config('configs/ablations/recommended-recipe.py')
    assert search([path, *GRID, '--out', str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {*NAMES, 'rank'}
    cfg = Config.fromfile(tmp_path / 'selected.py')
    cfg.model.backbone.cache = None
    assert cfg.train_dataloader == Config.fromfile(path).train_dataloader
    assert set(cfg.model.backbone.layers) == set(json.loads((tmp_path / 'selected.json').read_text())['selected'])
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model).eval()
    assert model.backbone.channels == cfg.model.backbone.channels
    with torch.no_grad():
        assert model.encode_decode(torch.zeros(1, 3, 64, 64), [{'img_shape': (64, 64)}]).shape == (1, 8, 64, 64)


def test_another_search_does_not_mix_with_what_is_there(search, pairs, undisturbed, capsys):
    before = files(undisturbed)
    for options, different in (
        (['--timesteps', '350', '50'], 'timesteps, candidates'),
        (['--dim', '32', '--dtype', 'float16'], 'transform, measure, dtype of maps'),
    ):
        assert search([pairs, *PAIRS, *options, '--out', str(undisturbed)]) == 2
        assert f'results of another search, which differs in {different};' in capsys.readouterr().err
    assert files(undisturbed) == before


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--layers', 'up-levle2-*'], "no layer matches 'up-levle2-*'"),
        (['--layers', 'up-level2'], "unknown activation 'up-level2'"),
        (['--cfg-options', 'train_dataloader.dataset.split=test'], 'nothing may be selected'),
        (['--cfg-options', 'train_dataloader=None'], 'has no train_dataloader'),
        (['--cfg-options', 'model.backbone.type=VisionBackbone'], 'a search is for one DiffusionBackbone'),
        (['--samples', '0'], 'count is 0'),
        (['--timesteps', '1000'], 'timesteps [1000] are not on the noise trajectory'),
    ],
)
def test_wrong_input(search, pairs, tmp_path, capsys, options, message):
    assert search([pairs, *PAIRS, '--out', str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def test_estimate_needs_neither_weights_nor_data(search, capsys):
    path = str(ROOT / 'configs/correspondence/sd15-t50_agg_1xb1-5k_spair-512x512.py')
    assert search([path, '--estimate', '--size', '512', '--pairs', '500']) == 0
    text = capsys.readouterr().out
    assert '197 activations x 10 timesteps = 1970 candidates' in text
    assert '500 pairs (seeds: 1) of 512 x 512 pixels: 1000 encodings' in text
    assert '1.9 GB of activations in a call, 1.48 GB of maps of an image' in text

"""Configs of HPatches: each is what its name and the README say, and each kind runs."""

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import DATASETS, METRICS, MODELS, TRANSFORMS
from parts import sites_of

import diffseg  # noqa: F401
from diffseg.diffusion.layer_sets import expand

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(ROOT.glob('configs/hpatches/*.py'))
TOY = sorted(ROOT.glob('configs/hpatches/toy/[!_]*.py'))
NAME = re.compile(
    r'(?P<model>.+)-t(?P<timestep>\d+)_dift(?P<published>-published)?_1xb(?P<batch>\d+)-zero-shot_hpatches-'
    r'(?P<height>\d+)x(?P<width>\d+)'
)
TOY_MAPS = {  # model, channels, cells of 48 x 64 pixels
    'dift-2_t0': ('tiny-sd', 64, (12, 16)),
    'best-layer_t0': ('tiny-sd', 48, (12, 16)),
    'adm-5_t41': ('tiny-adm', 48, (24, 32)),
}


def read(path: Path) -> Config:
    return Config.fromfile(path, import_custom_modules=False)


def test_all_configs_are_seen():
    assert (len(CONFIGS), len(TOY)) == (4, 6)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_what_its_name_says(path):
    cfg, name = read(path), NAME.fullmatch(path.stem)
    backbone, published = cfg.model.backbone, name['published'] is not None
    assert cfg.model.type == 'SparseMatcher'
    assert backbone.model == name['model'] and backbone.timesteps == [int(name['timestep'])]
    assert (backbone.get('noise') == 'random') == (cfg.model.get('convention') == 'published') == published
    available = sites_of(backbone.model)
    (site,) = (available[layer] for layer in expand(backbone.layers, available))
    assert backbone.channels == [site.channels]
    loader = cfg.test_dataloader
    assert loader.batch_size == int(name['batch'])
    steps = {step.type: step for step in loader.dataset.pipeline}
    assert list(steps) == ['LoadPair', 'DetectKeypoints', 'ResizePair', 'PackHomographyPair']
    assert steps['ResizePair'].size == int(name['height']) == int(name['width'])
    init_default_scope('mmseg')
    assert all(TRANSFORMS.build(step) for step in loader.dataset.pipeline)
    assert METRICS.build(cfg.test_evaluator).out_file == 'homography.json'
    assert loader.dataset.type in DATASETS


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_settings_are_those_of_dift(path):
    cfg = read(path)
    backbone = cfg.model.backbone
    found = backbone.layers[0], backbone.ensemble, cfg.model.metric, cfg.test_evaluator.method
    assert (
        found
        == {
            'sd21': ('up-level2-upsampler-out', 8, 'cosine', 'lmeds'),
            'adm-imagenet-256': ('adm-11', 4, 'l2', 'ransac'),
        }[backbone.model]
    )
    assert cfg.test_evaluator.threshold == 3


def stamp(cfg: Config) -> str:
    """What a config evaluates, as the README says it."""
    (resize,) = (step for step in cfg.test_dataloader.dataset.pipeline if step.type == 'ResizePair')
    said = [
        f'{resize.size} px',
        f'E {cfg.model.backbone.ensemble}',
        cfg.model.metric,
        cfg.test_evaluator.method.upper(),
    ]
    said += ['fresh noise'] if cfg.model.backbone.get('noise') == 'random' else []
    said += ['published coordinates'] if cfg.model.get('convention') == 'published' else []
    return ', '.join(said)


def test_the_readme_says_what_each_config_evaluates():
    text = (ROOT / 'configs/hpatches/README.md').read_text()
    rows = {m[1]: m[2] for m in re.finditer(r'^\| `(.+?)` \|.*\| (.+) \|$', text, re.M)}
    configs = {path.stem: stamp(read(path)) for path in CONFIGS}
    assert {name: rows.get(name) for name in configs} == configs


@pytest.fixture(scope='module')
def data_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A toy sequence of each kind, 48 x 64 pixels."""
    folder = tmp_path_factory.mktemp('data')
    arguments = [str(folder), '--sequences', '1', '--size', '48', '64']
    runpy.run_path(str(ROOT / 'tools/toy/make_hpatches.py'))['main'](arguments)
    return str(folder / 'HPatches-toy')


@pytest.fixture
def evaluate(data_root: str, tmp_path: Path) -> Callable[[Config], dict]:
    """Test a config on it, without points from files; the protocol of the result."""

    def run(cfg: Config) -> dict:
        loader = cfg.test_dataloader
        loader.dataset |= {'data_root': data_root, 'keypoints': None}
        loader.num_workers, loader.persistent_workers = 0, False
        cfg.work_dir = str(tmp_path)
        metrics = Runner.from_cfg(cfg).test()
        result = json.loads((tmp_path / 'homography.json').read_text())
        assert result['figures'] == metrics and len(result['pairs']) == 10
        assert set(metrics) >= {f'accuracy@{t}px/{g}' for t in (1, 3, 5) for g in ('all', 'illumination', 'viewpoint')}
        return {**result['protocol'], 'metrics': metrics}

    return run


@pytest.mark.parametrize('path', [path for path in CONFIGS if 'published' in path.stem], ids=lambda path: path.stem)
def test_each_kind_is_tested_without_a_checkpoint(path, evaluate, tiny_pipeline, tiny_pixel_pipeline):
    cfg = read(path)
    backbone, steps = cfg.model.backbone, cfg.test_dataloader.dataset.pipeline
    pixels = backbone.model.startswith('adm')
    backbone.update(model=str(tiny_pixel_pipeline if pixels else tiny_pipeline), channels=None)
    backbone.layers = ['adm-5'] if pixels else backbone.layers
    steps[1].num_points, steps[2].size = 50, 64
    protocol = evaluate(cfg)
    assert protocol['loaded_size'] == [64, 64] and protocol['keypoints'] == '50 of SIFT'
    assert protocol['draws'][0]['ensemble'] == cfg.model.backbone.ensemble
    assert (protocol['metric'], protocol['method']) == (cfg.model.metric, cfg.test_evaluator.method)


@pytest.mark.parametrize('path', TOY, ids=lambda path: path.stem)
def test_toy_config(path):
    cfg = read(path)
    name, channels, cells = TOY_MAPS[path.stem.removesuffix('_random-unet')]
    assert Path(cfg.model.backbone.model).resolve() == ROOT / 'demo' / name
    assert ('random-unet' in path.stem) == (cfg.model.backbone.get('random') == ['unet'])
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        descriptors = model.encode(torch.rand(1, 3, 48, 64) * 2 - 1, [None])
    assert descriptors.shape == (1, channels, *cells)


def test_the_toy_study_runs(evaluate):
    (path,) = (path for path in TOY if path.stem == 'best-layer_t0')
    metrics = evaluate(read(path))['metrics']
    assert metrics['accuracy@5px/illumination'] >= 60 and metrics['matches/all'] > 10

"""Configs of label propagation in videos: each is what its name and the README say, and each kind runs."""

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
from shrink import shrink_backbone

import diffseg  # noqa: F401
from diffseg.diffusion.layer_sets import expand

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(ROOT.glob('configs/video/*.py'))
TOY = sorted(ROOT.glob('configs/video/toy/[!_]*.py'))
NAME = re.compile(
    r'(?P<model>.+)-t(?P<timestep>\d+)_(dift|ditf)_1xb(?P<batch>\d+)-zero-shot_(?P<data>davis|jhmdb)-(?P<size>.+)'
)
KINDS = {  # labels, data set, metric
    'davis': ('mask', 'DAVISDataset', 'DAVISMetric'),
    'jhmdb': ('joints', 'JHMDBDataset', 'JHMDBMetric'),
}
SETTINGS = {  # layer, ensemble, temperature, topk, radius, previous frames
    ('sd21', 'davis'): ('up-level2-upsampler-out', 8, 0.2, 15, 15, 28),
    ('sd21', 'jhmdb'): ('up-level2-upsampler-out', 8, 0.2, 15, 5, 28),
    ('adm-imagenet-256', 'davis'): ('adm-7', 4, 0.1, 10, 15, 28),
    ('flux-dev', 'davis'): ('vit-block24-mod', 8, 0.2, 15, 15, 28),
    ('adm-imagenet-256', 'jhmdb'): ('adm-5', 4, 0.1, 15, 5, 28),
}


def read(path: Path) -> Config:
    return Config.fromfile(path, import_custom_modules=False)


def size_of(cfg: Config) -> str:
    """To what frames are resized, as file names say it."""
    (step,) = cfg.test_dataloader.dataset.pipeline
    assert step.type == 'LoadVideo'
    if 'long_side' in step:
        return f'long{step.long_side}'
    return f'{step.short_side}p' if 'short_side' in step else 'x'.join(map(str, step.size))


def test_all_configs_are_seen():
    assert (len(CONFIGS), len(TOY)) == (5, 4)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_what_its_name_says(path):
    cfg, name = read(path), NAME.fullmatch(path.stem)
    model, loader, backbone = cfg.model, cfg.test_dataloader, cfg.model.backbone
    assert model.type == 'LabelPropagator'
    assert backbone.model == name['model'] and backbone.timesteps == [int(name['timestep'])]
    assert (model.get('labels', 'mask'), loader.dataset.type, cfg.test_evaluator.type) == KINDS[name['data']]
    assert loader.batch_size == int(name['batch']) and size_of(cfg) == name['size']
    found = backbone.layers[0], backbone.ensemble, model.temperature, model.topk, model.radius, model.previous_frames
    assert found == SETTINGS[name['model'], name['data']]
    available = sites_of(backbone.model)
    (site,) = (available[layer] for layer in expand(backbone.layers, available))
    assert backbone.channels == [site.channels] and site.stride == (16 if backbone.model == 'flux-dev' else 8)
    init_default_scope('mmseg')
    assert TRANSFORMS.build(loader.dataset.pipeline[0]) and METRICS.build(cfg.test_evaluator)
    assert loader.dataset.type in DATASETS


def stamp(cfg: Config) -> str:
    """What a config evaluates, as the README says it."""
    model = cfg.model
    return (
        f'{size_of(cfg)}, `{model.backbone.layers[0]}`, E {model.backbone.ensemble}, {model.previous_frames} frames, '
        f'top {model.topk}, radius {model.radius}, temperature {model.temperature}'
    )


def test_the_readme_says_what_each_config_evaluates():
    text = (ROOT / 'configs/video/README.md').read_text()
    rows = {m[1]: m[2] for m in re.finditer(r'^\| `(.+?)` \|.*\| (.+) \|$', text, re.M)}
    assert {path.stem: rows.get(path.stem) for path in CONFIGS} == {path.stem: stamp(read(path)) for path in CONFIGS}


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where there is a toy clip of five frames, 32 x 48 pixels, by the type of data set."""
    folder = tmp_path_factory.mktemp('data')
    main = runpy.run_path(str(ROOT / 'tools/toy/make_davis.py'))['main']
    for options in ['--train', '0'], ['--jhmdb']:
        main([str(folder), *options, '--val', '1', '--frames', '5', '--size', '32', '48'])
    return {'DAVISDataset': str(folder / 'DAVIS-toy'), 'JHMDBDataset': str(folder / 'JHMDB-toy')}


@pytest.fixture
def evaluate(data: dict[str, str], tmp_path: Path) -> Callable[[Config], dict[str, float]]:
    """Test a config on it."""

    def run(cfg: Config) -> dict[str, float]:
        dataset = cfg.test_dataloader.dataset
        dataset.data_root = data[dataset.type]
        cfg.work_dir = str(tmp_path)
        return Runner.from_cfg(cfg).test()

    return run


@pytest.mark.parametrize(
    'path', [path for path in CONFIGS if ('adm' in path.stem) == ('jhmdb' in path.stem)], ids=lambda path: path.stem
)
def test_each_kind_is_tested_without_a_checkpoint(
    path, evaluate, tiny_pipeline, tiny_pixel_pipeline, pipeline_folder, tmp_path
):
    cfg = read(path)
    backbone, (load,) = cfg.model.backbone, cfg.test_dataloader.dataset.pipeline
    pixels = backbone.model.startswith('adm')
    if backbone.model == 'flux-dev':
        shrink_backbone(backbone, {'flux-dev': pipeline_folder('flux')})
    else:
        backbone.update(model=str(tiny_pixel_pipeline if pixels else tiny_pipeline), channels=None)
    load.update(
        {name: (32, 32) if name == 'size' else 32 for name in ('short_side', 'long_side', 'size') if name in load}
    )
    metrics = evaluate(cfg)
    if cfg.test_evaluator.type == 'DAVISMetric':
        assert 0 <= metrics['J&F-Mean'] <= 100 and (tmp_path / 'objects.csv').is_file()
        assert len(list(tmp_path.glob('videos/masks/*/*.png'))) == 5
    else:
        assert 0 <= metrics['PCK@0.1'] <= metrics['PCK@0.2'] <= 100
    assert list(tmp_path.glob('videos/overlays/**/*.mp4')) and list(tmp_path.glob('videos/strips/**/*.png'))


@pytest.mark.parametrize('path', TOY, ids=lambda path: path.stem)
def test_toy_config(path):
    cfg = read(path)
    assert Path(cfg.model.backbone.model).resolve() == ROOT / 'demo/tiny-sd'
    assert ('random-unet' in path.stem) == (cfg.model.backbone.get('random') == ['unet'])
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        descriptors = model.encode(torch.rand(1, 3, 96, 160) * 2 - 1)
    assert descriptors.shape[2:] == (24, 40) and descriptors.std() > 0


@pytest.mark.parametrize(('name', 'figure'), [('masks', 'J&F-Mean'), ('joints', 'PCK@0.2')])
def test_the_toy_studies_beat_a_copy_of_the_first_frame(name, figure, evaluate):
    cfg = read(ROOT / f'configs/video/toy/{name}.py')
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook.type != 'VideoResultHook']
    cfg.test_dataloader.dataset.pipeline[0].update({'short_side': 64} if name == 'masks' else {'size': (64, 96)})
    propagated = evaluate(cfg)[figure]
    cfg.model.update(radius=0, previous_frames=0)
    assert propagated > evaluate(cfg)[figure] + 10

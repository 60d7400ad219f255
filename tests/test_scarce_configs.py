"""Every shipped config of label-scarce segmentation that trains pixel classifiers; the channels are the model's own."""

import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.registry import DATASETS, MODELS
from parts import described, members, sites_of
from PIL import Image
from shrink import shrink_backbone

from diffseg.diffusion.layer_sets import LAYER_SETS
from diffseg.diffusion.sites import resolve
from diffseg.models.decode_heads import PixelClassifierHead

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / 'configs/scarce').glob('*_pixel-classifier*.py'))
NAME = re.compile(
    r'(?P<model>.+?)(?P<legacy>-legacy)?(-t(?P<timesteps>[\d+]+))?_pixel-classifier(?P<published>-published)?_'
    r'1xb(?P<pixels>\d+)-(?P<epochs>\d+)e_'
    r'(?P<dataset>.+)-(?P<size>\d+)x\d+'
)
PUBLISHED = {  # GDF and DDPM: channels of a pixel
    'ddpm-lsun-horse-t50+150+250': 8448,
    'mae-l8-lsun-horse': 12288,
    'swav-w2-lsun-horse': 13440,
    'sd15-legacy-t51': 3520,
    'sdxl-legacy-t50': 2240,
    'sd15-t51': 3520,
    'sdxl-t50': 3840,
    'sdxl+sd15+playground-v2': 8154,
    'pixart-sigma-t50': 2304,
    'sd3-medium-t260': 3072,
    'flux-dev-t260': 6144,
}
FIGURES = {  # arXiv 2410.03558, Horse-21
    'swav-w2-lsun-horse_pixel-classifier': '54.0 ± 0.9',
    'mae-l8-lsun-horse_pixel-classifier': '63.4 ± 1.4',
    'deeplabv3-r101': '60.8 ± 1.0',
    'ddpm-lsun-horse-t50+150+250_pixel-classifier': '65.0 ± 0.8',
    'sd15-legacy-t51_pixel-classifier-published': '59.4 ± 1.3',
    'sdxl-legacy-t50_pixel-classifier-published': '53.0 ± 0.9',
    'sd15-t51_pixel-classifier-published': '60.2 ± 0.9',
    'sdxl-t50_pixel-classifier-published': '62.7 ± 0.7',
    'sdxl+sd15+playground-v2_pixel-classifier-published': '66.3 ± 0.9',
}
OTHER_LAYERS = {
    'mae-l8-lsun-horse': list(range(13, 25)),  # the last twelve of 24 blocks, counted from 1
    'pixart-sigma': ['vit-block12-mod', 'vit-block16-mod'],
    'sd3-medium': ['vit-block9-mod', 'vit-block14-mod'],
    'flux-dev': ['vit-block24-mod', 'vit-block28-mod'],
    'swav-w2-lsun-horse': [f'layer{i + 1}.{j}' for i, blocks in enumerate((3, 4, 6, 3)) for j in range(0, blocks, 2)],
}
SMALL = {'Resize': {'scale': (64, 64)}, 'LoadLabelArray': {'size': 32}, 'IgnoreSmallClasses': {'min_pixels': 2}}
TRAINED = ['ddpm-lsun-horse-t50+150+250', 'sd15-t51', 'flux-dev-t260', 'sdxl+sd15+playground-v2']


def test_all_configs_are_seen():
    assert len(CONFIGS) == 29


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_what_its_name_says(path):
    cfg, name = Config.fromfile(path), NAME.fullmatch(path.stem)
    generated = name['dataset'].startswith('dataset-ddpm-')
    category = name['dataset'].removeprefix('dataset-ddpm-').replace('-', '_')
    splits = ['ddpm' if generated else 'real/train', 'real/test']
    for split, loader in zip(splits, (cfg.train_dataloader, cfg.test_dataloader), strict=True):
        assert (loader.dataset.category, loader.dataset.split) == (category, split)
        assert loader.dataset.data_root == f'data/{category}'
        assert (loader.sampler.type, loader.sampler.shuffle) == ('DefaultSampler', False)
    assert cfg.model.decode_head.num_classes == len(DATASETS.get('ScarceDataset').CATEGORIES[category]['classes'])
    assert (cfg.train_cfg.type, cfg.train_cfg.max_epochs) == ('PixelClassifierLoop', int(name['epochs']))
    assert cfg.optim_wrapper.optimizer == {'type': 'Adam', 'lr': 1e-3}
    assert cfg.test_evaluator == {'type': 'ScarceIoUMetric', 'iou_metrics': ['mIoU']}
    assert (cfg.model.data_preprocessor.mean, cfg.model.data_preprocessor.std) == ([127.5] * 3, [127.5] * 3)

    parts = members(cfg.model.backbone)
    if name['timesteps']:
        assert ['+'.join(map(str, part.timesteps)) for part in parts] == [name['timesteps']]
    if category == 'toy':
        assert Path(parts[0].model).resolve() == ROOT / 'demo' / name['model']
    else:
        assert '+'.join(Path(part.model).stem for part in parts) == name['model']
        size = int(name['size'])
        for loader in (cfg.train_dataloader, cfg.test_dataloader):
            steps = {step.type: step for step in loader.dataset.pipeline}
            assert ('Resize' in steps) == (len(parts) == 1)
            if 'Resize' in steps:
                assert steps['Resize'].scale == (size, size)
            else:  # each member resizes the pictures itself
                assert {part.interpolation for part in parts} == {'bicubic'}
        assert max(part.get('input_size', size) for part in parts) == size
        assert cfg.model.decode_head.output_size == 256


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_channels_are_those_of_the_model(path):
    cfg, found = Config.fromfile(path), []
    for part in members(cfg.model.backbone):
        if part.type != 'DiffusionBackbone':
            with torch.device('meta'):
                backbone = MODELS.build({**part, 'random': True})
                maps = backbone(torch.empty(1, 3, 256, 256))
            found += [x.shape[1] for x in maps]
            assert found == part.channels
            continue
        available = sites_of(part.model)
        channels = [available[layer].channels for layer in resolve(part.layers, available)]
        channels += [154] * len(part.get('attention_maps', []))
        assert channels == part.channels
        found += [len(part.timesteps) * each for each in channels]
    assert cfg.model.decode_head.in_channels == found
    with torch.device('meta'):
        head = PixelClassifierHead(**{key: value for key, value in cfg.model.decode_head.items() if key != 'type'})
    assert head.ensemble.linears[0].weight.shape[:2] == (10, sum(found))
    if 'horse' in path.stem:
        assert sum(found) == PUBLISHED[path.stem.split('_')[0]]


@pytest.mark.parametrize('path', [path for path in CONFIGS if '_toy-' not in path.stem], ids=lambda path: path.stem)
def test_layers_are_the_published_sets(path):
    cfg, name = Config.fromfile(path), NAME.fullmatch(path.stem)
    if others := OTHER_LAYERS.get(name['model']):
        assert cfg.model.backbone.layers == others
        return
    sets = [['practical', 'amalgamation', 'amalgamation'][i] for i in range(len(members(cfg.model.backbone)))]
    sets = ['legacy'] if name['legacy'] else ['ddpm-seg'] if name['model'].startswith('ddpm') else sets
    for part, wanted in zip(members(cfg.model.backbone), sets, strict=True):
        variant = LAYER_SETS[wanted][1 if part.model in ('sdxl', 'playground-v2') else 0]
        assert sorted(part.layers) == sorted(variant)


@pytest.mark.parametrize('path', [path for path in CONFIGS if 'horse-21' in path.stem], ids=lambda path: path.stem)
def test_published_configs_repeat_maps_to_the_largest_of_their_model(path):
    cfg, published = Config.fromfile(path), '-published' in path.stem
    parts = members(cfg.model.backbone)
    assert {part.get('noise', 'seeded') for part in parts} == {'random' if published else 'seeded'}
    resize = cfg.model.decode_head.get('resize', 'bilinear')
    if not published:
        assert resize == 'bilinear'
    elif len(parts) == 1:
        assert resize == 'nearest'
    else:
        assert resize == ['nearest'] * (4 + 5) + ['bilinear']
        sides = [[x.shape[2] for x in described(part, 1024, 1024)] for part in parts]
        assert [max(each) for each in sides] == [64, 64, 32]


def test_the_readme_has_every_config_of_horse_21_and_what_is_published_of_it():
    folder = ROOT / 'configs/scarce'
    rows = re.findall(r'^\| `(.+?)` \| (.*?) \|(?: (\d*) \|)?$', (folder / 'README.md').read_text(), re.M)
    wanted = [path.stem for path in folder.glob('*horse-21-*.py') if '100e_dataset-ddpm' not in path.stem]
    horse = {stem: (figure, channels) for stem, figure, channels in rows if stem in wanted}
    assert sorted(horse) == sorted(wanted)
    figures = {stem: figure.partition(': ')[2] for stem, (figure, _) in horse.items() if figure}
    assert {stem.split('_1xb')[0]: figure for stem, figure in figures.items()} == FIGURES
    for stem, (_, channels) in horse.items():
        if channels:
            assert int(channels) == sum(Config.fromfile(folder / f'{stem}.py').model.decode_head.in_channels)
    others = [stem for stem, _, _ in rows if stem not in wanted and stem.startswith('ddpm')]
    assert len(others) == 5 and all((folder / f'{stem}.py').is_file() for stem in others)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """Two training pictures and a test picture of Horse-21, of sizes that are not those of the labels."""
    root, generator = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    for i, split in enumerate(('train', 'train', 'test')):
        folder = root / 'real' / split
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(256, size=(40 + 8 * i, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{i}.png')
        np.save(folder / f'{i}.npy', np.kron(generator.integers(21, size=(5, 5)), np.ones((8, 8), dtype=np.int64)))
    return root


@pytest.fixture(scope='module')
def adm_pipeline(tmp_path_factory) -> Path:
    """A model of pixel space with as many levels as guided-diffusion's at 64 pixels: output block 12 is there."""
    down, up = ['ResnetDownsampleBlock2D', *['AttnDownBlock2D'] * 4], [*['AttnUpBlock2D'] * 4, 'ResnetUpsampleBlock2D']
    blocks = {'block_out_channels': (8, 8, 16, 16, 16), 'down_block_types': down, 'up_block_types': up}
    return tiny.save_pixel(tmp_path_factory.mktemp('models') / 'adm', **blocks)


@pytest.mark.parametrize('model', TRAINED)
def test_trains_saves_resumes_and_tests(
    model, tiny_pipeline, tiny_sdxl_pipeline, adm_pipeline, pipeline_folder, data, tmp_path
):
    stems = [path for path in CONFIGS if path.stem.startswith(f'{model}_pixel-classifier_')]
    path = next(path for path in stems if '_horse-21-' in path.stem)
    models = {
        'ddpm-lsun-horse': adm_pipeline,
        'flux-dev': pipeline_folder('flux'),
        'sd15': tiny_pipeline,
        'sdxl': tiny_sdxl_pipeline,
        'playground-v2': tiny_sdxl_pipeline,
    }

    def runner(**options):
        cfg = Config.fromfile(path)
        channels = shrink_backbone(cfg.model.backbone, models)
        cfg.model.decode_head.in_channels = [len(members(cfg.model.backbone)[0].timesteps) * each for each in channels]
        for part in members(cfg.model.backbone):
            part['dtype'] = 'float32'
        for loader in (cfg.train_dataloader, cfg.test_dataloader):
            loader.num_workers = 0
            loader.dataset.data_root = str(data)
            for step in loader.dataset.pipeline:
                step.update(SMALL.get(step.type, {}))
        cfg.model.decode_head.update(output_size=32, num_members=3, num_pixels=128, hidden=(8, 6))
        cfg.work_dir = str(tmp_path)
        cfg.merge_from_dict(options)
        return Runner.from_cfg(cfg)

    first = runner(**{'train_cfg.max_epochs': 1})
    before = {name: tensor.clone() for name, tensor in first.model.named_parameters() if tensor.requires_grad}
    first.train()
    assert [name for name, tensor in before.items() if first.model.get_parameter(name).equal(tensor)] == []
    second = runner(**{'train_cfg.max_epochs': 2, 'resume': True})
    second.train()
    assert second.iter == 2 * first.iter > 0
    metrics = second.test()
    assert metrics == second.test()
    assert 0 <= metrics['scarce/mIoU'] <= metrics['mIoU'] <= 100

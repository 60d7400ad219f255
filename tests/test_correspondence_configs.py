"""Configs of semantic correspondence: each is what its file name says, its parts fit together, and each kind runs."""

import json
import re
import runpy
from functools import cache
from pathlib import Path

import pytest
import tiny_vision
import torch
from ddp_worker import run_test_as_one_of_two
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from mmseg.registry import DATASETS, METRICS, MODELS
from parts import described, members
from processes import forkserver
from shrink import divide, shrink_backbone, shrink_neck
from torch import nn

from diffseg.models.backbones.ensemble import join_levels

ROOT = Path(__file__).resolve().parents[1]
REAL_PAIRS = ROOT.parent / 'shared/data/SPair-71k-mini'
CONFIGS = sorted(ROOT.glob('configs/correspondence/*.py'))
TOY = sorted(ROOT.glob('configs/correspondence/toy/[!_]*.py'))
NAME = re.compile(
    r'(?P<model>[^_]+?)(-(?P<trajectory>clean|inversion)(?P<steps>\d+)?)?(-t(?P<timesteps>[\d+]+))?_'
    r'(?P<method>[^_]+?)(?P<published>-published)?_(?P<gpus>\d+)xb(?P<batch>\d+)-'
    r'(?P<schedule>zero-shot|(?P<trained_on>spair-)?(?P<iterations>\d+)k)_(?P<dataset>[^_]+)-(?P<height>\d+)x(?P<width>\d+)'
)
DATASET_TYPES = {
    'spair': 'SPairDataset',
    'pf-willow': 'PFWillowDataset',
    'pf-pascal': 'PFPascalDataset',
    'cub': 'CUBPairsDataset',
    'spair-u': 'SPairUDataset',
    'tss': 'TSSDataset',
    'ap10k': 'AP10KDataset',
    'ap10k-cross-species': 'AP10KDataset',
    'ap10k-cross-family': 'AP10KDataset',
}
NECKS = {'agg': 'AggregationNeck', 'dhf': 'AggregationNeck', 'concat': 'ConcatNeck', 'conv': 'ConcatNeck'}
LAST_SAVED = {'dhf': 4000, 'conv': 9500}  # of 5000 and 10,000 steps of the released code
DESCRIPTORS = {  # channels, by the beginning of the config's name, without the schedule and what is behind it
    'sd21-t261_dift': 1280,
    'adm-imagenet-256-t101_dift': 1024,
    'cleandift-': 1280,
    'sd15-clean_layer-': 1280,
    'sd15-clean_concat-all': 10560,
    'sdxl-t50_up-level0': 1280,
    'sdxl-t50_up-level1': 640,
    'dino': 768,
    'openclip': 1280,
    'sd21+dinov2-b-t261_concat': 2048,
    'sd15+dinov2-b-t100_concat': 3968,
    'flux-dev-t260_ditf': 3072,
    'flux-dev+dinov2-b-t260_concat': 3840,
    'sd15-t51_conv-published': 3520,
    'sd15-legacy-t51_conv-published': 3520,
    'sdxl-t50_conv-published': 3840,
    'sdxl-legacy-t50_conv-published': 2240,
    'sdxl+sd15+playground-v2_conv-published': 4077,
}
ZERO_SHOT = {  # one config each is tested
    'DIFT': 'sd21-t261_dift_1xb1-zero-shot_spair-768x768',
    'DIFT, pixel space': 'adm-imagenet-256-t101_dift_1xb1-zero-shot_spair-512x512',
    'CleanDIFT': 'cleandift-sd15-t261_dift_1xb1-zero-shot_spair-512x512',
    'concatenation': 'sd15-clean_concat-all_1xb1-zero-shot_spair-512x512',
    'SDXL': 'sdxl-t50_up-level1-repeat0-vit-block0-out_1xb1-zero-shot_spair-1024x1024',
    'vision transformer': 'dinov3-b_tokens_1xb1-zero-shot_spair-960x960',
    'DiTF': 'flux-dev-t260_ditf-mod-discard_1xb1-zero-shot_spair-640x640',
    'Flux + DINO': 'flux-dev+dinov2-b-t260_concat_1xb1-zero-shot_spair-640x640',
    'SD + DINO': 'sd15+dinov2-b-t100_concat_1xb1-zero-shot_spair-960x960',
}
TRAINED = {  # one config each is trained
    'DHF': 'sd15-inversion11_agg_1xb1-5k_spair-512x512',
    'DHF, published': 'sd15-clean_dhf-published_1xb1-5k_spair-512x512',
    'GDF': 'sd15-t50_agg_1xb1-5k_spair-512x512',
    'SD3': 'sd3-medium-t260_agg_1xb1-5k_spair-1024x1024',
    'GDF, published': 'sdxl-t50_conv-published_1xb1-10k_spair-1024x1024',
    'ensemble': 'sdxl+sd15+playground-v2_conv-published_1xb1-10k_spair-1024x1024',
}


@cache
def read(stem: str) -> Config:
    return Config.fromfile(ROOT / f'configs/correspondence/{stem}.py', import_custom_modules=False)


def test_all_configs_are_seen():
    assert (len(CONFIGS), len(TOY)) == (65, 8)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_what_its_name_says(path):
    cfg, name = read(path.stem), NAME.fullmatch(path.stem)
    model = cfg.model
    parts = members(model.backbone)
    diffusion = [part for part in parts if part.type == 'DiffusionBackbone']
    assert name['model'].startswith('+'.join(part.model for part in parts))
    assert all(part.get('trajectory') == name['trajectory'] for part in diffusion if name['trajectory'])
    assert not name['steps'] or all(len(part.timesteps) == int(name['steps']) for part in diffusion)
    if name['timesteps']:
        assert all(part.timesteps == [int(t) for t in name['timesteps'].split('+')] for part in diffusion)
    if (kind := name['method'].split('-')[0]) in NECKS:
        assert model.neck.type == NECKS[kind]

    trains = name['schedule'] != 'zero-shot' and not name['trained_on']
    iterations = LAST_SAVED.get(name['method']) if name['published'] else 1000 * int(name['iterations'] or 0)
    assert cfg.get('train_cfg', {}).get('max_iters') == (iterations if trains else None)
    for kind in ('train', 'val', 'test'):
        loader = cfg.get(f'{kind}_dataloader')
        assert (loader is not None) == (trains or kind == 'test')
        if loader is not None:
            assert loader.batch_size == int(name['batch'])
            assert loader.dataset.type == DATASET_TYPES[name['dataset']]
            sizes = [step.size for step in loader.dataset.pipeline if step.type == 'ResizePair']
            if not sizes:  # each member resizes the pictures itself
                assert all(part.interpolation == 'bicubic' for part in parts)
                sizes = [max(part.input_size for part in parts)]
            assert sizes == [int(name['height'])] == [int(name['width'])]

    assert all((part.get('noise') == 'random') == bool(name['published']) for part in diffusion)
    lists = model.get('match_size') == 512
    assert lists == (name['published'] is not None or name['method'] in ('layer-4', 'layer-pruned', 'concat-all'))
    assert (lists and name['dataset'] == 'spair') == (cfg.test_dataloader.dataset.get('ann_file') is not None)
    selected_on_what_is_scored = name['method'] == 'conv'  # GDF, published
    assert cfg.test_evaluator.get('allow_selection_on_test', False) == selected_on_what_is_scored
    assert cfg.test_evaluator.out_file == 'pck.json'
    if trains:
        assert (cfg.test_dataloader.dataset == cfg.val_dataloader.dataset) == selected_on_what_is_scored
        assert cfg.default_hooks.checkpoint.save_best


@pytest.mark.parametrize('path', [path for path in CONFIGS if '_cub-512' in path.stem], ids=lambda path: path.stem)
def test_models_are_the_same_on_cub_as_on_spair(path):
    spair = path.stem.replace('1xb1-spair-5k', '1xb1-5k').replace('_cub-', '_spair-')
    assert read(path.stem).model == read(spair).model


def stamp(cfg: Config) -> str:
    """What a config evaluates, as the README says it."""
    data, model = cfg.test_dataloader.dataset, cfg.model
    diffusion = [part for part in members(model.backbone) if part.type == 'DiffusionBackbone']
    said = [data.get('ann_file') or data.get('protocol') or data.get('split')]
    if cfg.test_evaluator.get('allow_selection_on_test'):
        said.append('which also selects')
    for step in data.pipeline:
        side = 'longer side ' if step.get('keep_ratio') else ''
        said += {'ResizePair': [f'{side}{step.get("size")} px'], 'CropToBoxPair': ['cropped']}.get(step.type, [])
    if not any(step.type == 'ResizePair' for step in data.pipeline):
        said.append(f'{" + ".join(str(part.input_size) for part in members(model.backbone))} px')
    said.append('matched at ' + (f'{model.match_size} px' if 'match_size' in model else 'the original size'))
    if diffusion:
        prompt = model.get('prompt') or diffusion[0].get('prompt')
        said.append({None: 'no prompt', 'a photo of a {category}': 'category prompt'}.get(prompt, 'one prompt'))
        said += [f'E {part.ensemble}' for part in diffusion if part.get('ensemble', 1) > 1]
        said += ['fresh noise'] if diffusion[0].get('noise') == 'random' else []
    return ', '.join(said)


def test_the_readme_says_what_each_config_evaluates():
    text = (ROOT / 'configs/correspondence/README.md').read_text()
    rows = {name: line.split(' | ') for line in text.splitlines() for name in re.findall(r'^\| `(.+?)` \|', line)}
    assert sorted(rows) == [path.stem for path in CONFIGS]
    assert {name: row[-1].removesuffix(' |') for name, row in rows.items()} == {
        name: stamp(read(name)) for name in rows
    }


def test_published_recipes():
    for kind, rate, decay, interval in (('DHF, published', 1e-3, 0, 1000), ('GDF, published', 5e-4, 1e-2, 500)):
        cfg = read(TRAINED[kind])
        assert cfg.optim_wrapper.optimizer == {'type': 'AdamW', 'lr': rate, 'weight_decay': decay}
        assert cfg.param_scheduler == [] and cfg.train_cfg.val_interval == interval
    assert cfg.model.head.in_channels == 3840 and cfg.model.neck.output_sizes == [128]
    assert all(read(path.stem).model.get('store_dtype', 'float32') == 'float32' for path in CONFIGS)
    layer4 = read('sd15-clean_layer-4_1xb1-zero-shot_spair-512x512').model
    assert layer4.backbone.layers == ['up-level1-repeat0-res-increment']
    assert (layer4.neck.type, layer4.neck.output_sizes, layer4.match_size) == ('ConcatNeck', [64], 512)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_channels_are_those_of_the_model_and_neck_and_head_take_them(path):
    cfg = read(path.stem)
    init_default_scope('mmseg')
    parts = members(cfg.model.backbone)
    size = [int(side) for side in NAME.fullmatch(path.stem).group('height', 'width')]
    maps = [list(described(part, *size)) for part in parts]
    maps = join_levels(maps, [[len(each)] for each in maps])
    with torch.device('meta'):
        neck = MODELS.build(cfg.model.neck) if cfg.model.get('neck') else nn.Identity()
        head = MODELS.build(cfg.model.get('head') or {'type': 'DescriptorHead'})
    (level,) = neck(maps)
    descriptor = head(level)
    expected = [channels for start, channels in DESCRIPTORS.items() if path.stem.startswith(start)] or [384]
    assert [descriptor.shape[1]] == expected
    assert min(descriptor.shape[2:]) >= 16


@pytest.fixture(scope='module')
def models(
    tiny_pipeline, tiny_sdxl_pipeline, tiny_pixel_pipeline, pipeline_folder, tmp_path_factory
) -> dict[str, Path]:
    """A tiny model for each that the configs name."""
    folder = tmp_path_factory.mktemp('vision')
    return {
        **dict.fromkeys(('sd15', 'sd21', 'sd21-base', 'cleandift-sd15', 'cleandift-sd21'), tiny_pipeline),
        **dict.fromkeys(('sdxl', 'playground-v2'), tiny_sdxl_pipeline),
        'adm-imagenet-256': tiny_pixel_pipeline,
        'flux-dev': pipeline_folder('flux'),
        'sd3-medium': pipeline_folder('sd3'),
        'dinov2-b': tiny_vision.save(folder / 'dinov2'),
        'dinov3-b': tiny_vision.save(folder / 'dinov3', 'dinov3_vit'),
    }


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> dict[str, str]:
    """What makes a data set of a config one of six real pairs; where they are absent, one of four toy pairs."""
    if REAL_PAIRS.is_dir():
        return {'data_root': str(REAL_PAIRS), 'ann_file': 'spair_71k_test-6.json'}
    folder = tmp_path_factory.mktemp('pairs')
    arguments = [str(folder), '--train', '0', '--test', '0', '--pairs', '1']
    runpy.run_path(str(ROOT / 'tools/toy/make_data.py'))['main'](arguments)
    return {'data_root': str(folder / 'SPair-toy'), 'ann_file': ''}


def shrink(stem: str, models: dict[str, Path], data: dict[str, str], work_dir: Path) -> Config:
    """Read a config and change nothing but sizes, places, precision, numbers of timesteps and of validation pairs."""
    cfg = Config(read(stem).to_dict(), filename=read(stem).filename, format_python_code=False)
    channels = shrink_backbone(cfg.model.backbone, models)
    for part in members(cfg.model.backbone):
        part.dtype = 'float32'  # CPUs are slow at others
        if 'timesteps' in part:
            del part.timesteps[3:]  # of eleven
    if cfg.model.get('neck'):
        channels = shrink_neck(cfg.model.neck, channels)
        if 'timestep_names' in cfg.model.neck:
            del cfg.model.neck.timestep_names[3:]
            cfg.model.neck.timesteps = len(cfg.model.neck.timestep_names)
        if cfg.model.neck.get('output_sizes'):
            cfg.model.neck.output_sizes = divide(cfg.model.neck.output_sizes)
    if head := cfg.model.get('head'):
        (head.in_channels,) = channels
        if 'out_channels' in head:
            head.out_channels = head.in_channels // 2
    if cfg.model.get('match_size'):
        cfg.model.match_size = divide(cfg.model.match_size)
    for kind in ('train', 'val', 'test'):
        if loader := cfg.get(f'{kind}_dataloader'):
            loader.num_workers, loader.persistent_workers = 0, False
            loader.dataset |= data
            loader.dataset.indices = 1 if kind == 'val' else None
            for step in loader.dataset.pipeline:
                if 'size' in step:
                    step.size = divide(step.size)
    cfg.work_dir = str(work_dir)
    return cfg


def check_result(work_dir: Path, metrics: dict[str, float]) -> dict:
    """The result file says what the run returned; its protocol."""
    result = json.loads((work_dir / 'pck.json').read_text())
    assert {**result['figures']['all'], 'damaged': 0} == metrics
    assert all(0 <= value <= 100 for value in metrics.values())
    assert len(result['predictions']) == result['protocol']['pairs'] >= 4
    assert runpy.run_path(str(ROOT / 'tools/analysis/rescore.py'))['main']([str(work_dir / 'pck.json')]) == 0
    return result['protocol']


@pytest.mark.parametrize('stem', ZERO_SHOT.values(), ids=ZERO_SHOT.keys())
def test_every_zero_shot_kind_is_tested_without_a_checkpoint(stem, models, data, tmp_path):
    cfg = shrink(stem, models, data, tmp_path / 'work')
    cfg.dump(tmp_path / 'config.py')
    metrics = runpy.run_path(str(ROOT / 'tools/test.py'))['main']([str(tmp_path / 'config.py')])
    protocol = check_result(tmp_path / 'work', metrics)
    assert protocol['split'] == 'test' and not protocol['selection_on_test']


def test_two_processes_share_the_pairs_of_a_model_that_does_not_train(models, data, tmp_path):
    shrink(ZERO_SHOT['DIFT'], models, data, tmp_path / 'work').dump(tmp_path / 'config.py')
    alone = runpy.run_path(str(ROOT / 'tools/test.py'))['main']([str(tmp_path / 'config.py')])
    context, arguments = forkserver(), (ROOT / 'tools/test.py', tmp_path / 'config.py', tmp_path)
    processes = [context.Process(target=run_test_as_one_of_two, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=900)
    assert [process.exitcode for process in processes] == [0, 0]
    assert json.loads((tmp_path / 'rank0.json').read_text()) == pytest.approx(alone)


@pytest.mark.parametrize('stem', TRAINED.values(), ids=TRAINED.keys())
def test_every_trained_kind_trains_saves_resumes_and_tests(stem, models, data, tmp_path):
    cfg = shrink(stem, models, data, tmp_path)
    cfg.train_cfg.max_iters = cfg.train_cfg.val_interval = 2
    cfg.default_hooks.checkpoint.interval = cfg.default_hooks.logger.interval = 1
    cfg.default_hooks.checkpoint.max_keep_ckpts = -1
    runner = Runner.from_cfg(cfg)
    runner.train()
    first, second = (CheckpointLoader.load_checkpoint(str(tmp_path / f'iter_{i}.pth'), 'cpu') for i in (1, 2))
    assert second['meta']['iter'] == 2 and list(tmp_path.glob('best_PCK@0.1-bbox_point_iter_*.pth'))
    trained = {name for name, parameter in runner.model.named_parameters() if parameter.requires_grad}
    assert trained and all(not torch.equal(first['state_dict'][name], second['state_dict'][name]) for name in trained)
    runner.resume(str(tmp_path / 'iter_1.pth'))
    parameters = dict(runner.model.named_parameters())
    assert runner.iter == 1 and all(torch.equal(first['state_dict'][name], parameters[name]) for name in trained)
    protocol = check_result(tmp_path, runner.test())
    assert protocol['selection_on_test'] == ('conv' in stem)
    if stem == TRAINED['ensemble']:
        assert protocol['input_size'] == [[128, 128], [64, 64], [128, 128]]
        prompt = [read(stem)['prompt']]
        assert [member['prompt'] for member in protocol['model']['members']] == [prompt] * 3
    if 'published' in stem:
        assert protocol['match_size'] == 64 and {draw['noise'] for draw in protocol['draws']} == {'random'}


def test_a_trained_model_needs_a_checkpoint(models, data, tmp_path, capsys):
    shrink(TRAINED['GDF'], models, data, tmp_path / 'work').dump(tmp_path / 'config.py')
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / 'tools/test.py'))['main']([str(tmp_path / 'config.py')])
    assert 'neck.levels.0' in capsys.readouterr().err


@pytest.mark.parametrize('path', TOY, ids=lambda path: path.stem)
def test_toy_config(path):
    cfg = Config.fromfile(path, import_custom_modules=False)
    backbone = cfg.model.backbone
    places = [Path(part.model).resolve().name for part in members(backbone)]
    assert places == ['tiny-sd', 'tiny-dit'][: len(places)] and (len(places) == 2) == ('tiny-dit' in path.stem)
    assert ('random-unet' in path.stem) == (backbone.get('random') == ['unet'])
    assert ('zero-shot' in path.stem) == ('train_cfg' not in cfg) == (backbone.get('cache') is None)
    backbone.pop('cache', None)
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    assert [c for part in members(backbone) for c in part.channels] == model.backbone.channels
    with torch.no_grad():
        descriptors = model.encode(torch.rand(1, 3, 64, 64) * 2 - 1, [None])
    channels = {'agg': 128, 'twelve-layers_t50': 912, 'single-layer': 64, 'three-layers': 448}
    assert descriptors.shape[1] == next(value for name, value in channels.items() if name in path.stem)
    assert descriptors.shape[2] >= 8 and descriptors.std() > 0


def test_inversion_and_noise_of_the_toy_study_differ_in_the_trajectory_alone():
    inversion, noise = (
        Config.fromfile(ROOT / f'configs/correspondence/toy/twelve-layers_{name}11_agg.py', import_custom_modules=False)
        for name in ('inversion', 'noise')
    )
    assert len(inversion.timesteps) == 11 and inversion.timesteps[1:] == noise.timesteps[1:]
    assert (inversion.timesteps[0], noise.timesteps[0]) == (-1, 0)
    assert inversion.layers == noise.layers and inversion.optim_wrapper == noise.optim_wrapper


def test_toy_study_scores_pairs_within_and_across_species(tmp_path):
    arguments = [str(tmp_path), '--train', '0', '--test', '0', '--pairs', '1', '--across', '1']
    runpy.run_path(str(ROOT / 'tools/toy/make_data.py'))['main'](arguments)
    cfg = Config.fromfile(ROOT / 'configs/correspondence/toy/single-layer_t50_zero-shot.py')
    for dataset, name in zip(cfg.test_dataloader.dataset.datasets, ('SPair-toy', 'SPair-toy-across'), strict=True):
        assert dataset.data_root == f'data/{name}'
        dataset.data_root = str(tmp_path / name)
    cfg.work_dir = str(tmp_path / 'work')
    metrics = Runner.from_cfg(cfg).test()
    for name, pairs in (('within', 4), ('across', 12)):
        assert 0 < metrics[f'{name}/PCK@0.1-bbox/point'] < 100
        assert json.loads((tmp_path / f'work/{name}.json').read_text())['protocol']['pairs'] == pairs


@pytest.fixture(scope='module')
def toy_data(tmp_path_factory) -> Path:
    """One toy pair of each kind that the configs of protocols name."""
    folder = tmp_path_factory.mktemp('data')
    arguments = [str(folder), '--train', '0', '--test', '0', '--ap10k', '1', '--unseen', '1', '--tss', '1']
    runpy.run_path(str(ROOT / 'tools/toy/make_data.py'))['main'](arguments)
    return folder


@pytest.mark.parametrize(
    'path', sorted(ROOT.glob('configs/correspondence/toy-protocols/*.py')), ids=lambda path: path.stem
)
def test_toy_protocols_find_their_data_and_say_their_options(path, toy_data):
    cfg = Config.fromfile(path, import_custom_modules=False)
    init_default_scope('mmseg')
    data = cfg.test_dataloader.dataset
    dataset = DATASETS.build({**data, 'data_root': str(toy_data / Path(data.data_root).relative_to('data'))})
    assert len(dataset) >= 2 and not dataset.damaged
    protocol = MODELS.build(cfg.model).protocol
    options = {name: cfg.model[name] for name in ('unit', 'window', 'temperature', 'cycle_error') if name in cfg.model}
    assert {name: protocol[name] for name in options} == options
    assert (protocol['align_pose'] is not None) == ('align_pose' in cfg.model) == (path.stem == 'aligned')
    assert METRICS.build(cfg.test_evaluator).confidence == ('cycle_error' if path.stem == 'confidence' else None)

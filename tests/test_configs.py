"""Every shipped config: it parses, it is what its file name says, and its parts fit together."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_vision
import torch
from layouts import write_ade20k, write_cityscapes
from ldm import unet_state
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import DATASETS, MODELS
from parts import described, members
from shrink import shrink
from torch import nn

from diffseg.diffusion.loading import meta_network
from diffseg.diffusion.sites import sites
from diffseg.models.backbones.ensemble import join_levels

ROOT = Path(__file__).parents[1] / 'configs'
SEGMENTATION = sorted((ROOT / 'segmentation').glob('*.py'))
NAME = re.compile(
    r'(?P<model>[^_]+?)(-t(?P<timesteps>[\d+]+))?_(?P<method>[^_]+?)(?P<published>-published)?_'
    r'(?P<gpus>\d+)xb(?P<batch>\d+)-(?P<iterations>\d+k?)_(?P<dataset>[^_]+)-(?P<height>\d+)x(?P<width>\d+)'
)
NECKS = {'agg': 'AggregationNeck', 'concat': 'ConcatNeck', 'fpn': 'FPN', 'mln': 'MultiLevelNeck'}
KINDS = {  # one config each is trained
    'published': 'sd15-t51_concat-upernet-published_1xb2-80k_ade20k-512x512',
    'recommended, Cityscapes': 'sdxl-t50_agg-upernet_1xb2-80k_cityscapes-1024x1024',
    'ensemble, published': 'sdxl+playground-v2-t50_concat-upernet-published_1xb2-80k_ade20k-512x512',
    'ensemble with a vision transformer': 'sd15+dinov2-b-t50_agg-upernet_1xb2-80k_ade20k-512x512',
    'ensemble with a transformer': 'sd15+flux-dev_agg-upernet_1xb2-80k_ade20k-512x512',
    'masked prompts': 'pixart-sigma-t50_agg-upernet_1xb2-80k_ade20k-512x512',
    'vision transformer': 'dinov2-b_agg-upernet_1xb2-80k_ade20k-512x512',
    'VPD': 'sd15-vpd-t1_fpn_8xb2-80k_ade20k-512x512',
    'VPD, frozen, Cityscapes': 'sd15-vpd-frozen-t1_fpn_8xb2-80k_cityscapes-1024x1024',
    'VPD, frozen, published': 'sd15-vpd-frozen-t51_concat-upernet-published_1xb2-80k_cityscapes-1024x1024',
    'Meta Prompts': 'sd15-metaprompts_upernet_8xb1-80k_ade20k-512x512',
    'Meta Prompts, frozen': 'sd15-metaprompts-frozen_upernet_8xb1-80k_cityscapes-1024x1024',
    'LoRA': 'sdxl-lora-t50_agg-upernet_1xb2-80k_ade20k-512x512',
    'part of the UNet': 'sd15-decoder-t50_agg-upernet_1xb2-80k_ade20k-512x512',
    'FCN': 'sdxl-t50_agg-fcn_1xb2-80k_ade20k-512x512',
    'PSPHead': 'sdxl-t50_agg-psp_1xb2-80k_ade20k-512x512',
    'SegFormer': 'sdxl-t50_agg-segformer_1xb2-80k_ade20k-512x512',
    'Mask2Former': 'sdxl-t50_agg-mask2former_8xb2-160k_ade20k-512x512',
    'FPN': 'sdxl-t50_fpn_1xb2-80k_ade20k-512x512',
    'MultiLevelNeck': 'sdxl-t50_mln-upernet_1xb2-80k_ade20k-512x512',
}


def test_all_configs_are_seen():
    assert len(SEGMENTATION) == 44


@cache
def read(path: Path) -> Config:
    """The config, without importing what it needs beyond this package. Read only."""
    return Config.fromfile(path, import_custom_modules=False)


@pytest.mark.parametrize('path', SEGMENTATION, ids=lambda path: path.stem)
def test_a_config_is_what_its_name_says(path):
    cfg, name = read(path), NAME.fullmatch(path.stem)
    parts = members(cfg.model.backbone)
    assert name['model'].startswith('+'.join(part.model for part in parts))
    if name['timesteps']:
        steps = [int(t) for t in name['timesteps'].split('+')]
        assert all(part.timesteps == steps for part in parts if part.type == 'DiffusionBackbone')
    if (kind := name['method'].split('-')[0]) in NECKS:
        neck = cfg.model.neck
        assert NECKS[kind] in (neck.type, *(part.type for part in neck.get('necks', [])))
    assert cfg.train_dataloader.batch_size == int(name['batch'])
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == int(name['iterations'].replace('k', '000'))
    assert name['dataset'] in cfg.dataset_type.lower()
    crop = int(name['height']), int(name['width'])
    assert cfg.model.data_preprocessor.size == crop == cfg.model.test_cfg.get('crop_size', crop)
    assert (cfg.model.data_preprocessor.mean, cfg.model.data_preprocessor.std) == ([127.5] * 3, [127.5] * 3)

    published = name['published'] is not None
    assert cfg.model.data_preprocessor.seg_pad_val == (1 if published else 255)
    assert all((part.get('noise') == 'random') == published for part in parts)
    assert not published or (cfg.model.neck.order == 'coarse-to-fine' and cfg.model.test_cfg.stride == (512, 512))


@pytest.mark.parametrize('path', SEGMENTATION, ids=lambda path: path.stem)
def test_channels_are_those_of_the_model_and_neck_and_heads_take_them(path):
    cfg = read(path)
    if 'mmdet.models' in cfg.custom_imports.imports and (reason := why_not_mmdet()):
        pytest.skip(reason)
    init_default_scope('mmseg')
    parts = members(cfg.model.backbone)
    maps = [list(described(part, *cfg.model.data_preprocessor.size)) for part in parts]
    maps = join_levels(maps, [part.get('levels', [len(each)]) for part, each in zip(parts, maps, strict=True)])
    with torch.device('meta'):
        neck = MODELS.build(cfg.model.neck) if cfg.model.get('neck') else nn.Identity()
        heads = [MODELS.build(head) for head in (cfg.model.decode_head, cfg.model.get('auxiliary_head')) if head]
    levels = neck(maps)
    classes = len(DATASETS.get(cfg.dataset_type).METAINFO['classes'])
    for head in heads:
        assert head.num_classes == classes
        if isinstance(head, BaseDecodeHead):  # Mask2Former's reads values, which the meta device has not
            assert head(levels).shape[:2] == (2, classes)


def why_not_mmdet() -> str | None:
    """Why Mask2Former cannot be built here."""
    if find_spec('mmdet') is None:
        return 'Mask2Former needs mmdet, which is not installed'
    if find_spec('mmcv._ext') is None:
        return 'Mask2Former needs an mmcv with compiled operators; this one has none'
    return None


@pytest.fixture(scope='module')
def models(tiny_pipeline, tiny_sdxl_pipeline, pipeline_folder, tmp_path_factory) -> dict[str, Path]:
    """A tiny model for each that the configs name."""
    vision = tiny_vision.save(tmp_path_factory.mktemp('vision') / 'dinov2')
    return {
        'sd15': tiny_pipeline,
        'sdxl': tiny_sdxl_pipeline,
        'playground-v2': tiny_sdxl_pipeline,
        'flux-dev': pipeline_folder('flux'),
        'pixart-sigma': pipeline_folder('pixart-sigma'),
        'dinov2-b': vision,
    }


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> dict[str, Path]:
    """Both data sets' folders."""
    folder = tmp_path_factory.mktemp('data')
    return {'ade20k': write_ade20k(folder, val=1), 'cityscapes': write_cityscapes(folder, val=1)}


@pytest.mark.parametrize('stem', KINDS.values(), ids=KINDS.keys())
def test_every_kind_trains_saves_resumes_and_tests(stem, models, data, tmp_path):
    if 'mask2former' in stem and (reason := why_not_mmdet()):
        pytest.skip(reason)
    path = ROOT / f'segmentation/{stem}.py'
    data_root = data[NAME.fullmatch(stem)['dataset']]
    runner = Runner.from_cfg(shrink(path, models, data_root, tmp_path, max_iters=2))
    runner.train()
    first, second = (CheckpointLoader.load_checkpoint(str(tmp_path / f'iter_{i}.pth'), 'cpu') for i in (1, 2))
    assert second['meta']['iter'] == 2
    assert len(second['message_hub']['log_scalars']['train/loss'].data[0]) == 2
    trained = {name for name, parameter in runner.model.named_parameters() if parameter.requires_grad}
    moved = {name for name in trained if not torch.equal(first['state_dict'][name], second['state_dict'][name])}
    assert trained - moved == set()
    runner.resume(str(tmp_path / 'iter_1.pth'))
    parameters = dict(runner.model.named_parameters())
    assert runner.iter == 1 and all(torch.equal(first['state_dict'][name], parameters[name]) for name in trained)
    assert 0 <= runner.test()['mIoU'] <= 100


def released_options(name: str) -> tuple[float, float]:
    """Learning rate and weight decay that VPD's and Meta Prompts' released keys give a parameter by its released name.

    Of the keys in a name the longest decides, and of those as long the first in the alphabet.
    """
    rate, decay = 8e-5, 1e-3
    if 'norm' in name:
        return rate, 0
    return (0.1 * rate, decay) if 'unet' in name else (rate, decay)


@pytest.mark.parametrize('kind', ['VPD', 'Meta Prompts'])
def test_parameters_learn_at_the_released_rates(kind, models, data, tmp_path):
    cfg = shrink(ROOT / f'segmentation/{KINDS[kind]}.py', models, data['ade20k'], tmp_path, max_iters=1)
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[group['params'][0]]: (group['lr'], group['weight_decay']) for group in groups}
    assert len(found) == len(groups) == len(names)
    unet = model.backbone.extractor.network
    released = {
        f'backbone.extractor.network.{ours}': f'unet.{theirs}'
        for ours, theirs in zip(unet.state_dict(), unet_state(unet), strict=True)
    }
    wanted = {ours: released_options(released.get(ours, 'head')) for ours in found}
    assert {name: pytest.approx(options) for name, options in wanted.items()} == found
    assert len(set(wanted.values())) == 3
    assert wanted['backbone.extractor.network.up_blocks.1.attentions.0.norm.weight'] == (8e-5, 0)
    assert wanted['backbone.extractor.network.up_blocks.1.resnets.0.norm1.weight'] == pytest.approx((8e-6, 1e-3))


@pytest.mark.parametrize('stem', [KINDS['VPD'], KINDS['Meta Prompts, frozen']])
def test_the_rate_falls_from_the_first_iteration_while_it_warms_up(stem):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    schedulers = [
        PARAM_SCHEDULERS.build({'optimizer': optimizer, **scheduler})
        for scheduler in read(ROOT / f'segmentation/{stem}.py').param_scheduler
    ]
    for i in range(2001):
        if i % 500 == 0:
            warmed = 1 - (1 - min(i / 1500, 1)) * (1 - 1e-6)
            assert optimizer.param_groups[0]['lr'] == pytest.approx(warmed * (1 - i / 80000), rel=1e-3)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def test_published_recipes():
    ade, city = (
        read(ROOT / f'segmentation/sd15-metaprompts_upernet_8xb1-80k_{data}.py')
        for data in ('ade20k-512x512', 'cityscapes-1024x1024')
    )
    for cfg, dropout in ((ade, 0.0), (city, 0.1)):
        assert (cfg.model.decode_head.dropout_ratio, cfg.model.auxiliary_head.dropout_ratio) == (dropout, dropout)
        assert (cfg.train_cfg.val_interval, cfg.default_hooks.checkpoint.save_best) == (8000, 'mIoU')
    dtypes = {
        path.stem.partition('_')[0]: {part.dtype for part in members(read(path).model.backbone)}
        for path in SEGMENTATION
        if '-published_' in path.stem
    }
    assert dtypes.pop('sd15-vpd-frozen-t51') == {'float32'}
    assert set().union(*dtypes.values()) == {'float16'}


def test_defaults_that_become_faster_do_not_change_published_values():
    paths = [path for path in ROOT.rglob('*published*.py') if '_base_' not in path.parts]
    assert len(paths) == 29
    for path in paths:
        for part in members(read(path).model.backbone):
            assert part.dtype in ('float16', 'float32') and part.memory_format == 'contiguous', path


def test_config_of_the_demo():
    path = ROOT / 'scarce/tiny-sd-t50+150+300_agg-fcn_1xb8-300_toy-64x64.py'
    cfg = Config.fromfile(path)
    name = NAME.fullmatch(path.stem)
    assert Path(cfg.model.backbone.model).resolve() == ROOT.parent / 'demo' / name['model']
    assert cfg.model.backbone.timesteps == [int(t) for t in name['timesteps'].split('+')]
    assert cfg.train_dataloader.batch_size == int(name['batch'])
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == int(name['iterations'])
    crop = int(name['height']), int(name['width'])
    assert cfg.model.data_preprocessor.size == crop

    init_default_scope('mmseg')
    model = MODELS.build(cfg.model).eval()
    classes = DATASETS.get(cfg.dataset_type).CATEGORIES[name['dataset']]['classes']
    with torch.no_grad():
        levels = model.extract_feat(torch.zeros(2, 3, *crop))
        assert [tuple(level.shape) for level in levels] == [(2, 128, 16, 16)]
        assert model.decode_head(levels).shape == (2, len(classes), 16, 16)


def test_the_lines_of_the_readme(tmp_path):
    readme = (ROOT.parent / 'README.md').read_text()
    (tmp_path / 'config.py').write_text(re.search(r'```python\n(_base_ = .+?)```', readme, re.S).group(1))
    cfg = Config.fromfile(tmp_path / 'config.py')
    assert cfg.layers == {layer: sites(meta_network('sd15'))[layer].channels for layer in cfg.layers}
    cfg.model.backbone.model = str(ROOT.parent / 'demo/tiny-sd')
    cfg.model.neck.levels = [[48], [64], [96]]
    cfg.model.decode_head.norm_cfg.type = 'BN'
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        assert model.encode_decode(torch.zeros(1, 3, 64, 64), [{'img_shape': (64, 64)}]).shape == (1, 19, 64, 64)

"""Every shipped config: it parses, it is what its file name says, and its parts fit together."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS

from diffseg.diffusion.activations import sites
from diffseg.diffusion.loading import meta_unet

ROOT = Path(__file__).parents[1] / 'configs'
SEGMENTATION = sorted((ROOT / 'segmentation').glob('*.py'))
SCARCE = sorted((ROOT / 'scarce').glob('*.py'))
NAME = re.compile(
    r'(?P<model>[^_]+)-t(?P<timesteps>[\d+]+)_(?P<method>[^_]+)_'
    r'(?P<gpus>\d+)xb(?P<batch>\d+)-(?P<iterations>\d+k?)_(?P<dataset>[^_]+)-(?P<height>\d+)x(?P<width>\d+)'
)


def test_all_configs_are_seen():
    assert (len(SEGMENTATION), len(SCARCE)) == (2, 1)


@pytest.mark.parametrize('path', SEGMENTATION, ids=lambda path: path.stem)
def test_segmentation_config(path):
    cfg = Config.fromfile(path)
    name = NAME.fullmatch(path.stem)

    backbone = cfg.model.backbone
    assert backbone.model == name['model']
    assert backbone.timesteps == [int(t) for t in name['timesteps'].split('+')]
    assert cfg.train_dataloader.batch_size == int(name['batch'])
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == int(name['iterations'].replace('k', '000'))
    assert name['dataset'] in cfg.dataset_type.lower()
    crop = int(name['height']), int(name['width'])
    assert cfg.model.data_preprocessor.size == cfg.model.test_cfg.crop_size == crop
    assert cfg.model.data_preprocessor.seg_pad_val == 255

    available = sites(meta_unet(backbone.model))
    layers = [available[layer] for layer in backbone.layers]
    assert backbone.channels == [site.channels for site in layers]
    side = backbone.get('input_size', crop[0])
    with torch.device('meta'):
        maps = [torch.empty(2, len(backbone.timesteps) * site.channels, *site.size(side, side)) for site in layers]
        levels = MODELS.build(cfg.model.neck)(maps)
        logits = MODELS.build(cfg.model.decode_head).train()(levels)
        auxiliary = MODELS.build(cfg.model.auxiliary_head)(levels)
    assert logits.shape == (2, len(DATASETS.get(cfg.dataset_type).METAINFO['classes']), *levels[0].shape[-2:])
    assert auxiliary.shape[:2] == logits.shape[:2]


@pytest.mark.parametrize('path', SCARCE, ids=lambda path: path.stem)
def test_scarce_config(path):
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
    assert cfg.layers == {layer: sites(meta_unet('sd15'))[layer].channels for layer in cfg.layers}
    cfg.model.backbone.model = str(ROOT.parent / 'demo/tiny-sd')
    cfg.model.neck.levels = [[48], [64], [96]]
    cfg.model.decode_head.norm_cfg.type = 'BN'
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        assert model.encode_decode(torch.zeros(1, 3, 64, 64), [{'img_shape': (64, 64)}]).shape == (1, 19, 64, 64)

"""Configs of distillation: their maps, sizes and variants."""

import re
from pathlib import Path

import pytest
from mmengine.config import Config
from parts import sites_of

ROOT = Path(__file__).parents[1] / 'configs/distillation'
CONFIGS = sorted(ROOT.glob('[!_]*.py'))
TOPOLOGIES = [ROOT / f'{name}.py' for name in ('sd15', 'sdxl', 'tiny-sd')]
TOY = sorted(ROOT.glob('toy/[!_]*.py'))
SIZES = {'sd15': 512, 'sd21': 768, 'sdxl': 1024}
TINY = Path(__file__).parents[1] / 'demo/tiny-sd'


def read(path):
    return Config.fromfile(path, import_custom_modules=False)


@pytest.mark.parametrize('path', TOPOLOGIES, ids=lambda path: path.stem)
def test_maps_are_the_ends_of_all_blocks_from_the_middle_on(path):
    cfg = read(path)
    backbone = cfg.model.backbone
    available = sites_of(backbone.model)
    assert [available[name].channels for name in backbone.layers] == backbone.channels
    blocks = {}  # the last of what can be read of each residual block and what follows it
    for name in available:
        if block := re.match(r'up-level\d+-repeat\d+(?=-res-out$|-vit-out$)', name):
            blocks[block[0]] = name
        elif name.endswith('upsampler-out'):
            blocks[max(block for block in blocks if block.startswith(name[:9]))] = name
    assert backbone.layers == ['mid-repeat1-res-out', *blocks.values()]


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_pictures_are_shuffled_and_those_of_validation_are_held_out(path):
    cfg = read(path)
    assert cfg.size == SIZES.get(path.stem, 64)
    assert str(cfg.size) in str(cfg.train_dataloader.dataset.pipeline) or cfg.size == 64
    train, val = cfg.train_dataloader.dataset, cfg.val_dataloader.dataset
    assert (train.part, val.part) == ('train', 'val')
    assert (train.data_root, train.held_out) == (val.data_root, val.held_out)
    assert cfg.train_dataloader.sampler.shuffle


def test_the_published_recipe():
    cfg = read(ROOT / 'sd15.py')
    assert cfg.optim_wrapper.optimizer == {'type': 'Adam', 'lr': 1e-5}
    assert (cfg.train_dataloader.batch_size, cfg.train_cfg.max_iters, cfg.model.timestep) == (8, 400, 261)


@pytest.mark.parametrize('path', TOY, ids=lambda path: path.stem)
def test_what_is_compared_differs_in_the_backbone_alone(path, monkeypatch):
    monkeypatch.setenv('SEED', '3')
    cfg, base = read(path), read(path.with_name(f'_{path.stem.rpartition("_")[2]}.py'))
    backbone, name = cfg.model.backbone, path.stem.rpartition('_')[0]
    assert Path(backbone.model).resolve() == TINY
    assert backbone.noise == 'random' and backbone.get('ensemble', 1) == (8 if 'noise8' in name else 1)
    assert (backbone.get('trajectory') == 'clean') == ('noise' not in name)
    if 'distilled' in name:
        student = name.replace('-distilled', '')
        assert backbone.network_weights == f'work_dirs/splits/{student}/seed3/unet.safetensors'
        assert backbone.timesteps == [read(ROOT / f'{student}.py').model.timestep]
    cfg.model.backbone = base.model.backbone
    assert cfg.to_dict() == base.to_dict()

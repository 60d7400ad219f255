"""Every shipped config: it parses, it is what its file name says, and its parts fit together."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmseg.registry import DATASETS, MODELS

from diffseg.diffusion.activations import sites
from diffseg.diffusion.loading import meta_unet

ROOT = Path(__file__).parents[1] / 'configs'
SEGMENTATION = sorted((ROOT / 'segmentation').glob('*.py'))
NAME = re.compile(
    r'(?P<model>[^_]+)-t(?P<timesteps>[\d+]+)_(?P<method>[^_]+)_'
    r'(?P<gpus>\d+)xb(?P<batch>\d+)-(?P<thousands>\d+)k_(?P<dataset>[^_]+)-(?P<height>\d+)x(?P<width>\d+)'
)


def test_all_configs_are_seen():
    assert len(SEGMENTATION) == 2


@pytest.mark.parametrize('path', SEGMENTATION, ids=lambda path: path.stem)
def test_segmentation_config(path):
    cfg = Config.fromfile(path)
    name = NAME.fullmatch(path.stem)

    backbone = cfg.model.backbone
    assert backbone.model == name['model']
    assert backbone.timesteps == [int(t) for t in name['timesteps'].split('+')]
    assert cfg.train_dataloader.batch_size == int(name['batch'])
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == int(name['thousands']) * 1000
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

"""The configs of the search, and those that a selection is compared with."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

import diffseg  # noqa: F401
from diffseg.diffusion.layer_sets import LAYER_SETS

CONFIGS = sorted(Path(__file__).parents[1].glob('configs/search/*.py'))


def test_all_configs_are_seen():
    assert len(CONFIGS) == 4


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_layers_are_those_published_and_fit_the_neck(path):
    cfg = Config.fromfile(path)
    cfg.model.backbone.pop('cache', None)
    published = LAYER_SETS['legacy' if path.stem.startswith('legacy') else 'practical'][0]
    assert sorted(cfg.model.backbone.layers) == sorted(published) and cfg.model.backbone.timesteps == [50]
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model).eval()
    assert model.backbone.channels == cfg.model.backbone.channels
    with torch.no_grad():
        maps = model.neck(model.backbone(torch.zeros(1, 3, 64, 64)))
        if path.stem.endswith('zero-shot') or path.stem == 'pairs':
            assert [x.shape for x in maps] == [(1, sum(model.backbone.channels), 16, 16)]
            assert (cfg.train_dataloader is None) == (path.stem != 'pairs')
        else:
            assert [x.shape[-1] for x in maps] == [16, 8, 4]
            assert model.decode_head(maps).shape == (1, 8, 16, 16)

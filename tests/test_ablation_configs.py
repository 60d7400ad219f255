"""The configs that are compared with each other: each builds on the model of the demo."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

import diffseg  # noqa: F401

CONFIGS = [path for path in sorted(Path(__file__).parents[1].glob('configs/ablations/*.py')) if path.stem[0] != '_']


def test_all_configs_are_seen():
    assert len(CONFIGS) == 17


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_builds_and_predicts(path):
    cfg = Config.fromfile(path)
    if named := re.search(r'_t([\d+]+)_', path.stem):
        assert cfg.model.backbone.timesteps == [int(t) for t in named[1].split('+')]
    assert (cfg.model.backbone.cache is None) == (cfg.model.backbone.get('noise') == 'random')
    cfg.model.backbone.cache = None
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model).eval()
    assert cfg.model.backbone.channels == model.backbone.channels
    with torch.no_grad():
        logits = model.encode_decode(torch.zeros(1, 3, 64, 64), [{'img_shape': (64, 64)}])
    assert logits.shape == (1, 8, 64, 64)


def test_published_recipe_predicts_at_the_size_of_the_coarsest_level():
    sizes = {}
    init_default_scope('mmseg')
    for recipe in ('published-recipe', 'published-recipe_fine-to-coarse', 'recommended-recipe'):
        cfg = Config.fromfile(CONFIGS[0].parent / f'{recipe}.py')
        cfg.model.backbone.cache = None
        model = MODELS.build(cfg.model).eval()
        with torch.no_grad():
            sizes[recipe] = model.decode_head(model.extract_feat(torch.zeros(1, 3, 64, 64))).shape[-1]
    assert sizes == {'published-recipe': 4, 'published-recipe_fine-to-coarse': 16, 'recommended-recipe': 16}

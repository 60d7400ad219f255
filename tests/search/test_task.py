"""Tests for diffseg.search.task."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict

from diffseg.diffusion.loading import meta_network
from diffseg.diffusion.schedules import build_schedule
from diffseg.diffusion.sites import sites
from diffseg.search import Candidate
from diffseg.search.task import Options, Search, configured_candidates, training_data

ROOT = Path(__file__).resolve().parents[2]


def config(train: dict, test: dict) -> Config:
    return Config({f'{name}_dataloader': {'dataset': data} for name, data in (('train', train), ('test', test))})


def dataset(root: str, *steps: str, **options) -> dict:
    return {'type': 'X', 'data_root': root, 'pipeline': [{'type': step} for step in steps], **options}


def test_training_data_pass_through_the_pipeline_of_the_test():
    train = {'type': 'RepeatDataset', 'times': 9, 'dataset': dataset('a', 'Load', 'Flip')}
    test = {'type': 'ConcatDataset', 'datasets': [dataset('b', 'Load', 'Pack'), dataset('c')]}
    cfg = config(train, test)
    data = training_data(cfg)
    assert data == {**train, 'dataset': dataset('a', 'Load', 'Pack', test_mode=True)}
    assert cfg.train_dataloader.dataset == train  # as it was


@pytest.mark.parametrize(
    ('train', 'test'),
    [
        (dataset('a', 'Flip'), dataset('a', 'Pack', test_mode=True)),
        (dataset('a', split='test'), dataset('b')),
        (dataset('a', split='val'), dataset('a', split='test')),
        ({'type': 'ConcatDataset', 'datasets': [dataset('a'), dataset('b')]}, dataset('b')),
    ],
)
def test_nothing_is_selected_by_held_out_data(train, test):
    with pytest.raises(ValueError, match='nothing may be selected'):
        training_data(config(train, test))


def test_a_pipeline_without_augmentation_is_needed():
    with pytest.raises(ValueError, match='no test_dataloader'):
        training_data(Config({'train_dataloader': {'dataset': dataset('a')}}))


def test_configured_candidates_have_resolved_names():
    available = sites(meta_network(str(ROOT / 'demo/tiny-sd')))
    backbone = {'layers': ['dift-1', 'up-level3-repeat0-res-out@7+9'], 'timesteps': [7, 9, 50]}
    schedule = build_schedule({}, 'tiny-sd')
    assert list(map(str, configured_candidates(backbone, available, schedule))) == [
        'up-level1-upsampler-out@7',
        'up-level1-upsampler-out@9',
        'up-level1-upsampler-out@50',
        'up-level3-repeat0-res-out@7',
        'up-level3-repeat0-res-out@9',
    ]
    assert configured_candidates({**backbone, 'attention_maps': ['up_cross']}, available, schedule) == ()


def test_shortlist_has_few_of_each_activation_and_those_of_the_config():
    cfg = Config.fromfile(ROOT / 'configs/search/pairs.py')
    available = sites(meta_network(cfg.model.backbone.model))
    search = Search(cfg, available, Options(shortlist=5))
    shortlist = search._short([Candidate(layer, t) for layer in ('unet-in', 'mid-vit-out') for t in range(9)])
    assert list(map(str, shortlist)) == ['unet-in@0', 'unet-in@1', 'mid-vit-out@0', 'mid-vit-out@1']
    shortlist = search._short(search.candidates)
    assert len(shortlist) == 5 + 4 and set(search.configured) <= set(shortlist)


def test_costs_are_estimated_for_the_dtype_that_auto_takes(monkeypatch):
    cfg = Config.fromfile(ROOT / 'configs/search/pairs.py')
    available = sites(meta_network(cfg.model.backbone.model))
    texts = {}
    for dtype in ('float32', 'bfloat16', 'auto'):
        monkeypatch.setattr('diffseg.search.task.fast_dtype', lambda device: torch.bfloat16)
        cfg.model.backbone.dtype = dtype
        texts[dtype] = Search(cfg, available, Options(count=2)).plan(None, (64, 64)).text
    assert texts['auto'] == texts['bfloat16'] != texts['float32']


def test_a_prompt_that_is_learned_cannot_be_searched():
    cfg = Config.fromfile(ROOT / 'configs/search/pairs.py')
    cfg.model.backbone.conditioner = ConfigDict(type='LearnedPrompts')
    with pytest.raises(ValueError, match='the prompt is learned by LearnedPrompts'):
        Search(cfg, {}, Options())

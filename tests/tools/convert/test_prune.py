"""Pruning gives a whole config and checkpoint, and where nothing of weight is dropped, the same function."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from mmseg.registry import MODELS
from tiny_mmseg import CHANNELS, LAYERS, TIMESTEPS, segmentor_config
from torch import nn

NAMES = [LAYERS[:2], LAYERS[2:]]
ALL_CHANNELS = [channels for level in CHANNELS for channels in level]


@pytest.fixture(scope='module')
def tool(load_tool: Callable) -> ModuleType:
    return load_tool('convert/prune')


def build(config: Path) -> nn.Module:
    init_default_scope('mmseg')
    torch.manual_seed(1)
    return MODELS.build(Config.fromfile(config).model).eval()


def concentrate(neck: nn.Module, pairs: list[list[tuple[int, int]]]) -> None:
    """Give all weight to these (timestep, layer) of each level."""
    for level, kept in zip(neck.levels, pairs, strict=True):
        logits = torch.full(level.mixed.shape, -50.0)
        logits[tuple(zip(*kept, strict=True))] = torch.randn(len(kept))
        level.mixing_weights.data = logits[level.mixed]
        for parameter in level.bottleneck_layers.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)


@pytest.fixture
def prune(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`prune(model, pairs, *options)` concentrates weights, prunes, and returns both models and what was printed."""

    def run(
        model: dict, pairs: list, *options: str, neck: str = 'neck', count: bool = False
    ) -> tuple[nn.Module, nn.Module, str]:
        if not count:  # which takes seconds
            monkeypatch.setattr(tool, 'operations', lambda *args: 1)
        Config({'model': model, 'layers': {}, 'work_dir': 'x'}).dump(tmp_path / 'full.py')
        full = build(tmp_path / 'full.py')
        concentrate(full.get_submodule(neck), pairs)
        torch.save({'state_dict': full.state_dict(), 'meta': {'iter': 7}}, tmp_path / 'full.pth')
        arguments = [str(tmp_path / 'full.py'), str(tmp_path / 'full.pth'), '--out', str(tmp_path / 'out'), *options]
        assert tool.main(arguments) == 0, capsys.readouterr().err
        config, checkpoint = (next((tmp_path / 'out').glob(f'full-keep*.{kind}')) for kind in ('py', 'pth'))
        pruned = build(config)
        load_checkpoint(pruned, str(checkpoint), map_location='cpu', strict=True)
        return full, pruned, capsys.readouterr().out

    return run


def same(full: nn.Module, pruned: nn.Module, *sizes: tuple[int, int]) -> None:
    with torch.no_grad():
        for size in sizes:
            images = torch.rand(2, 3, *size) * 2 - 1
            maps = [model.neck(model.backbone(images)) for model in (full, pruned)]
            for ours, theirs in zip(*maps, strict=True):
                assert ours.shape == theirs.shape
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_best_pairs_of_every_level(prune: Callable, tiny_pipeline: Path, tmp_path: Path):
    model = segmentor_config(tiny_pipeline, {'channels': ALL_CHANNELS})
    model.neck |= {'layer_names': NAMES, 'timestep_names': TIMESTEPS}
    full, pruned, printed = prune(
        model, [[(0, 1), (2, 1)], [(0, 1), (2, 0)]], '--keep', '2', '--size', '64x96', count=True
    )
    same(full, pruned, (64, 96), (64, 64))
    cfg = Config.fromfile(tmp_path / 'out' / 'full-keep2.py')
    assert cfg.model.backbone['layers'] == LAYERS[1:] and cfg.model.backbone.channels == ALL_CHANNELS[1:]
    assert cfg.model.backbone.timesteps == cfg.model.neck.timestep_names == [50, 500] and cfg.model.neck.timesteps == 2
    assert cfg.model.neck.kept == [[[0, 1]], [[1], [0]]]
    assert cfg.model.neck.enlarge == [2, 1]  # the finest layer, of stride 8, is gone
    assert cfg.work_dir == 'x' and 'layers' not in cfg
    assert 'level 0: 2 of 6 pairs, with 100.0% of the weight' in printed and '4 layers -> 3, 3 timesteps' in printed
    before, after = re.search(r'at 64 x 96 pixels: (\S+) GFLOP -> (\S+) GFLOP', printed).groups()
    assert 0 < float(after) < float(before)
    stored = torch.load(tmp_path / 'out' / 'full-keep2.pth')
    assert stored['meta'] == {'iter': 7, 'cfg': cfg.pretty_text}


def test_one_pair_of_inverted_images_in_a_model_of_correspondence(prune: Callable, tiny_pipeline: Path, tmp_path: Path):
    model = {
        'type': 'CorrespondenceModel',
        'backbone': {
            'type': 'DiffusionBackbone',
            'model': str(tiny_pipeline),
            'layers': ['dhf-1-0', 'dhf-3-2'],
            'timesteps': [-1, 60, 160],
            'trajectory': 'inversion',
        },
        'neck': {
            'type': 'NeckSequence',
            'necks': [
                {
                    'type': 'AggregationNeck',
                    'levels': [[64, 32]],
                    'timesteps': 3,
                    'out_channels': 16,
                    'num_groups': 4,
                    'output_sizes': [16],
                },
                {'type': 'ConcatNeck', 'levels': [[16]]},
            ],
        },
    }
    full, pruned, _ = prune(model, [[(1, 0)]], '--keep', '1', neck='neck.necks.0')
    same(full, pruned, (64, 64))
    assert pruned.backbone.extractor.timesteps == (60,) and len(pruned.neck.necks) == 2
    neck = Config.fromfile(tmp_path / 'out' / 'full-keep1.py').model.neck.necks[0]
    assert not {'kept', 'enlarge'} & set(neck)  # one layer and one timestep are all there is


def test_pruned_again(prune: Callable, tiny_pipeline: Path):
    model = segmentor_config(tiny_pipeline)
    model.neck |= {'kept': [[[0, 2], [1]], [[0], [0, 1, 2]]], 'enlarge': [2, 1]}
    full, pruned, printed = prune(model, [[(1, 1)], [(0, 1), (2, 1)]], '--keep', '3', '--overall')
    same(full, pruned, (64, 96))
    assert pruned.neck.enlarge == [4, 1]
    assert 'level 0: 1 of 3' in printed and 'level 1: 2 of 4' in printed


def test_what_is_trained_in_the_backbone_goes_with_it(prune: Callable, tiny_pipeline: Path):
    model = segmentor_config(tiny_pipeline, {'lora': {'r': 2}})
    full, pruned, _ = prune(model, [[(0, 1)], [(0, 0)]], '--keep', '1')
    same(full, pruned, (64, 64))
    names = [set(each.backbone.state_dict()) for each in (full, pruned)]
    assert names[1] < names[0] and len(names[1]) > 1


def test_choice(tool: ModuleType):
    tables = [torch.tensor([[0.5, 0.1], [0.0, 0.4]]), torch.tensor([[0.3, 0.3], [0.2, 0.2]])]
    assert tool.choose(tables, 2) == [[(0, 0), (1, 1)], [(0, 0), (0, 1)]]
    assert tool.choose(tables, 3, overall=True) == [[(0, 0), (1, 1)], [(0, 0)]]
    assert tool.choose(tables, 7, overall=True) == [[(0, 0), (0, 1), (1, 1)], [(0, 0), (0, 1), (1, 0), (1, 1)]]
    with pytest.raises(ValueError, match='cannot keep 4 pairs: the smallest level can have 1 to 3'):
        tool.choose(tables, 4)
    with pytest.raises(ValueError, match='cannot keep 1 pairs: 2 levels together can have 2 to 7'):
        tool.choose(tables, 1, overall=True)


def test_errors(tool: ModuleType, tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    def error(model: dict) -> str:
        Config({'model': model}).dump(tmp_path / 'bad.py')
        torch.save({'state_dict': {}}, tmp_path / 'bad.pth')
        arguments = [str(tmp_path / 'bad.py'), str(tmp_path / 'bad.pth'), '--keep', '1', '--out', str(tmp_path)]
        assert tool.main(arguments) == 2
        return capsys.readouterr().err

    assert 'the backbone of the model is VisionBackbone' in error({'backbone': {'type': 'VisionBackbone'}})
    assert 'no AggregationNeck' in error(segmentor_config(tiny_pipeline, neck=None))
    gated = segmentor_config(tiny_pipeline)
    gated.neck.type = 'GatedAggregationNeck'
    assert 'no AggregationNeck' in error(gated)
    assert 'does not fit the config' in error(segmentor_config(tiny_pipeline))
    fewer = segmentor_config(tiny_pipeline, {'layers': LAYERS[:1]})
    own = segmentor_config(tiny_pipeline, {'layers': [*LAYERS[:3], f'{LAYERS[3]}@50']})
    assert f'own cannot be pruned: {LAYERS[3]}@50' in error(own)
    assert 'the neck mixes 4 maps, and the backbone has 1' in error(fewer)

"""Backbones, necks, heads and models of correspondence on an accelerator: nothing strays to the host, nothing waits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_vision
import torch
from fake_device import fake_device, on_device
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from tiny_mmseg import CHANNELS, backbone_config
from torch import nn

import diffseg.models.correspondence  # noqa: F401
from diffseg.models.propagation.windowed import propagate_labels

LAYERS = [f'up-level{n}-repeat0-vit-block0-{name}' for n in (1, 0) for name in ('self-k', 'cross-q')]  # of two levels
UNCHECKED = {'check_finite': False}


@pytest.fixture(autouse=True)
def _registry_of_mmseg() -> None:
    init_default_scope('mmseg')


@pytest.fixture
def make(shallow_sd15: Path) -> Callable[..., nn.Module]:
    """Build a `DiffusionBackbone`, or what its `type` says, in evaluation mode."""

    def make(**options) -> nn.Module:
        config = {'timesteps': [50, 261], **UNCHECKED, **options}
        return MODELS.build(backbone_config(shallow_sd15, **config)).eval()

    return make


def run(model: nn.Module, *size: int) -> list[torch.Tensor]:
    with fake_device(model) as to_device:
        maps = model(to_device(torch.zeros(2, 3, *size)))
    assert on_device(maps)
    return list(maps)


@pytest.mark.parametrize(
    'options',
    [
        {'layers': [f'{LAYERS[0]}@50', *LAYERS[1:]], 'input_size': 64},
        {'prompt': '', 'lora': {'r': 2}, 'layers': LAYERS[:1]},
        {'conditioner': {'type': 'LearnedPrompts', 'num_prompts': 5, 'dim': 32}, 'layers': LAYERS[2:]},
    ],
    ids=['timesteps of layers', 'layers of low rank', 'learned prompts'],
)
def test_diffusion_backbone(make, options):
    maps = run(make(**options), 64, 96)
    assert len(maps) == len(options['layers'])


def test_learned_classes(make, shallow_sd15):
    adapter = {'type': 'TextAdapter', 'model': str(shallow_sd15), 'classes': ['a', 'b'], 'templates': ['a {}']}
    run(make(conditioner=adapter, layers=LAYERS[2:]), 64, 64)


def test_meta_prompts(shallow_sd15):
    config = {'type': 'MetaPromptsBackbone', 'model': str(shallow_sd15), 'num_prompts': 6, 'refine_steps': 2}
    layers = ['up-level0-repeat1-res-out', 'up-level1-repeat1-res-out']
    run(MODELS.build({**config, 'layers': layers, **UNCHECKED}).eval(), 64, 64)


def test_an_ensemble(shallow_sd15):
    member = backbone_config(shallow_sd15, layers=LAYERS[:1], timesteps=[50], **UNCHECKED)
    backbones = [{**member, 'input_size': 64}, {**member, 'prompt': 'a horse', 'layers': LAYERS[1:2]}]
    assert len(run(MODELS.build({'type': 'EnsembleBackbone', 'backbones': backbones}).eval(), 64, 96)) == 2


@pytest.mark.parametrize(
    'neck',
    [
        {'type': 'AggregationNeck', 'timesteps': 2, 'out_channels': 16, 'num_groups': 2},
        {
            'type': 'AggregationNeck',
            'timesteps': 2,
            'out_channels': 16,
            'num_groups': 2,
            'kept': [[[0], [0, 1]], [[1], [0]]],
            'resize': 'before',
        },
        {'type': 'ConcatNeck', 'timesteps': 2, 'normalize': True},
        {'type': 'GatedAggregationNeck', 'timesteps': 2, 'out_channels': 16, 'num_groups': 2},
    ],
    ids=['AggregationNeck', 'AggregationNeck, pruned', 'ConcatNeck', 'GatedAggregationNeck'],
)
def test_necks(neck):
    model = MODELS.build({**neck, 'levels': CHANNELS}).eval()
    sizes = [8, 4, 2, 2]
    with fake_device(model) as to_device:
        channels = [c for level in CHANNELS for c in level]
        maps = [torch.zeros(2, 2 * c, s, s) for c, s in zip(channels, sizes, strict=True)]
        levels = model(to_device(maps))
        assert on_device(levels) and [x.shape[-1] for x in levels] == [8, 2]


def test_pixel_classifiers():
    head = {'type': 'PixelClassifierHead', 'in_channels': [8, 4], 'num_classes': 3, 'num_members': 2}
    model = MODELS.build(head).eval()
    with fake_device(model) as to_device:
        maps = to_device([torch.zeros(2, 8, 4, 4), torch.zeros(2, 4, 8, 8)])
        assert on_device(model.pixel_logits(maps, (16, 16)))


def test_vision_backbone(tmp_path):
    config = {'type': 'VisionBackbone', 'model': str(tiny_vision.save(tmp_path)), 'layers': [1, -1], **UNCHECKED}
    run(MODELS.build(config).eval(), 32, 40)


def test_correspondence(shallow_sd15):
    backbone = backbone_config(shallow_sd15, layers=LAYERS[1:2], timesteps=[50], **UNCHECKED)
    model = MODELS.build({'type': 'CorrespondenceModel', 'backbone': backbone}).eval()
    with fake_device(model) as to_device:
        maps = model.encode(to_device(torch.zeros(2, 3, 64, 64)), [None, None])
        assert on_device(maps)


def test_propagation_of_labels():
    with fake_device() as to_device:
        frames, labels = (to_device([torch.zeros(c, 6, 8) for _ in range(3)]) for c in (16, 4))
        assert on_device(propagate_labels(frames[0], frames, labels, topk=5, radius=3, temperature=0.1))

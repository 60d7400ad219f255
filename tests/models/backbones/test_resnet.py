"""Tests for diffseg.models.backbones.resnet."""

from pathlib import Path

import pytest
import torch
from mmseg.models.backbones import ResNet
from mmseg.registry import MODELS
from torch import Tensor
from torch.nn import functional as F

from diffseg.models.backbones import ResNetBackbone

LAYERS = ['layer1.0', 'layer1.1', 'layer2.0', 'layer4.1']


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    """A ResNet-18 as SwAV saves its networks."""
    torch.manual_seed(0)
    state = ResNet(18).state_dict()
    for name, tensor in state.items():
        if 'running' in name:
            tensor.uniform_(0.5, 1.5)
    extra = {'projection_head.0.weight': torch.zeros(2, 2), 'prototypes.weight': torch.zeros(3, 2)}
    state = {f'module.{name}': tensor for name, tensor in {**state, **extra}.items()}
    path = tmp_path_factory.mktemp('resnet') / 'swav.pth'
    torch.save({'epoch': 3, 'state_dict': state}, path)
    return path


def build(model: Path | str, **options) -> ResNetBackbone:
    return MODELS.build({'type': 'ResNetBackbone', 'model': str(model), 'layers': LAYERS, 'depth': 18, **options})


def inputs_of_blocks(state: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """What a ResNet of two-layer blocks has before each block, computed from torchvision's names."""

    def convolve(x: Tensor, conv: str, norm: str, **options: int) -> Tensor:
        names = [f'module.{norm}.{name}' for name in ('running_mean', 'running_var', 'weight', 'bias')]
        return F.batch_norm(F.conv2d(x, state[f'module.{conv}.weight'], **options), *(state[name] for name in names))

    x = F.max_pool2d(convolve(x, 'conv1', 'bn1', stride=2, padding=3).relu(), 3, stride=2, padding=1)
    maps = {}
    for stage in range(1, 5):
        for i in range(2):
            name = f'layer{stage}.{i}'
            maps[name] = x
            stride = 2 if stage > 1 and i == 0 else 1
            y = convolve(x, f'{name}.conv1', f'{name}.bn1', stride=stride, padding=1).relu()
            y = convolve(y, f'{name}.conv2', f'{name}.bn2', padding=1)
            if f'module.{name}.downsample.0.weight' in state:
                x = convolve(x, f'{name}.downsample.0', f'{name}.downsample.1', stride=stride)
            x = (x + y).relu()
    return maps


@torch.no_grad()
def test_maps_are_the_inputs_of_blocks(checkpoint):
    x = torch.rand(2, 3, 40, 64) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((x + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    expected = inputs_of_blocks(torch.load(checkpoint)['state_dict'], pixels)
    backbone = build(checkpoint).train()
    maps = backbone(x)
    assert [y.shape[1] for y in maps] == backbone.channels == [64, 64, 64, 512]
    for layer, y in zip(LAYERS, maps, strict=True):
        torch.testing.assert_close(y, expected[layer])
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert build(checkpoint, input_size=32)(x)[0].shape == (2, 64, 8, 8)


def test_state_dict_is_the_fingerprint(checkpoint):
    backbone = build(checkpoint)
    (state,) = backbone.state_dict().values()
    assert state.dtype == torch.uint8
    build(checkpoint).load_state_dict(backbone.state_dict(), strict=True)
    with pytest.raises(ValueError, match='weights was'):
        build('none', random=True).load_state_dict(backbone.state_dict())


def test_the_wide_network_of_swav():
    with torch.device('meta'):
        backbone = build('none', depth=50, width=2, layers=['layer1.0', 'layer2.0', 'layer4.2'], random=True)
        maps = backbone(torch.empty(1, 3, 256, 256))
    assert [tuple(y.shape[1:]) for y in maps] == [(128, 64, 64), (512, 64, 64), (4096, 8, 8)]
    assert backbone.network.conv1.weight.shape == (128, 3, 7, 7)


def test_errors(checkpoint, tmp_path):
    for options, message in (
        ({'depth': 20}, 'depth is 20'),
        ({'layers': ['layer1.2']}, r"no blocks \['layer1.2'\]; it has layer1.0, layer1.1"),
        ({'channels': [64, 64, 64, 64]}, 'layer4.1 has 512, not 64'),
        ({'width': 2}, 'set depth and width'),
    ):
        with pytest.raises(ValueError, match=message):
            build(checkpoint, **options)
    with pytest.raises(FileNotFoundError, match='no checkpoint file'):
        build(tmp_path / 'none.pth')

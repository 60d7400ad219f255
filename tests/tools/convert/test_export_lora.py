"""Tests for tools/convert/export_lora.py."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mmseg.registry import MODELS
from tiny_mmseg import backbone_config
from torch import nn

import diffseg.models  # noqa: F401


@pytest.fixture
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool('convert/export_lora')


@pytest.fixture
def make(tiny_pipeline: Path) -> Callable[..., nn.Module]:
    def build(**options) -> nn.Module:
        return MODELS.build(backbone_config(tiny_pipeline, timesteps=[50], **options))

    return build


def trained(backbone: nn.Module) -> nn.Module:
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    return backbone


def test_what_was_trained_can_be_loaded_again(tool: ModuleType, make: Callable, tmp_path: Path):
    backbone = trained(make(lora={'r': 4, 'lora_alpha': 6}))
    state = nn.ModuleDict({'backbone': backbone}).state_dict()
    torch.save({'state_dict': state}, tmp_path / 'iter_1.pth')
    assert tool.main([str(tmp_path / 'iter_1.pth'), str(tmp_path / 'lora')]) == 0
    images = torch.rand(1, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        expected, plain = backbone(images), make()(images)
        found = make(lora_weights=[str(tmp_path / 'lora')])(images)
        half = make(lora_weights=[(str(tmp_path / 'lora'), 0.5)])(images)
    for a, b, c, d in zip(expected, found, plain, half, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        assert min((b - c).abs().max(), (b - d).abs().max(), (c - d).abs().max()) > 0.01


def test_several_backbones_and_none(tool: ModuleType, make: Callable):
    two = nn.ModuleDict({name: make(lora={'r': r}) for name, r in (('a', 2), ('b', 3))}).state_dict()
    with pytest.raises(ValueError, match=r'belong to a\. and b\.; choose'):
        tool.convert(two)
    assert {x.shape[0] for name, x in tool.convert(two, 'b.')[1].items() if 'lora_A' in name} == {3}
    with pytest.raises(ValueError, match='no LoRA layers'):
        tool.convert(make().state_dict())


def test_a_checkpoint_without_rank_and_alpha(tool: ModuleType, make: Callable):
    state = nn.ModuleDict({'backbone': make(lora={'r': 2})}).state_dict()
    del state['backbone._extra_state']
    with pytest.raises(ValueError, match=r'lacks backbone\._extra_state'):
        tool.convert(state)


def test_errors(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture):
    torch.save({'state_dict': {}}, tmp_path / 'no_lora.pth')
    torch.save(Path('x'), tmp_path / 'object.pth')
    torch.save([], tmp_path / 'list.pth')
    (tmp_path / 'text.pth').write_text('text')
    (tmp_path / 'empty.pth').touch()
    for name, message in {
        'no_lora': 'no_lora.pth: the checkpoint has no LoRA layers',
        'object': r'object.pth is no checkpoint, .* an object of the class pathlib\.',
        'list': 'list.pth is no checkpoint: it holds a list',
        'text': 'text.pth is no checkpoint, or a damaged one',
        'empty': 'empty.pth is no checkpoint, or a damaged one',
        'none': 'no checkpoint at .*none.pth',
    }.items():
        assert tool.main([str(tmp_path / f'{name}.pth'), str(tmp_path / 'lora')]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.match(f'error: .*{message}', line), line

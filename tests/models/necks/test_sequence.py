"""Tests for diffseg.models.necks.sequence."""

import torch
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

import diffseg.models  # noqa: F401


def test_levels_are_formed_and_then_go_through_a_neck_of_mmseg():
    init_default_scope('mmseg')
    concat = {'type': 'ConcatNeck', 'levels': [[3, 5], [4]]}
    pyramid = {'type': 'FPN', 'in_channels': [8, 4], 'out_channels': 6, 'num_outs': 2}
    neck = MODELS.build({'type': 'NeckSequence', 'necks': [concat, pyramid]})
    maps = [torch.randn(2, 3, 8, 12), torch.randn(2, 5, 4, 6), torch.randn(2, 4, 4, 6)]
    found = neck(maps)
    assert [tuple(x.shape) for x in found] == [(2, 6, 8, 12), (2, 6, 4, 6)]
    assert {name.split('.')[1] for name, _ in neck.named_parameters()} == {'1'}
    for step in neck.necks:
        maps = step(maps)
    assert all(torch.equal(x, y) for x, y in zip(found, maps, strict=True))

"""Tests for diffseg.search.configs."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from tiny_mmseg import batch, segmentor_config

from diffseg.diffusion.loading import meta_network
from diffseg.diffusion.sites import Site, sites
from diffseg.geometry import resize
from diffseg.search import Candidate
from diffseg.search.configs import correspondence_model, segmentation_model

MODEL = Path(__file__).resolve().parents[2] / 'demo' / 'tiny-sd'
SELECTED = [
    Candidate('up-level2-repeat1-vit-out', 300),  # stride 8, 64 channels
    Candidate('up-level3-repeat0-res-out', 50),  # stride 4, 48 channels
    Candidate('up-level1-repeat2-res-out', 50),  # stride 16, 96 channels
    Candidate('up-level2-repeat1-vit-out', 50),
]
FINE_TO_COARSE = [SELECTED[i] for i in (1, 0, 3, 2)]
HEAD = {'channels': 8, 'num_classes': 3, 'norm_cfg': {'type': 'BN'}, 'align_corners': False}
UPER = {'type': 'UPerHead', 'in_channels': [32, 32], 'in_index': [0, 1], 'pool_scales': (1, 2), **HEAD}
AUXILIARY = {'type': 'FCNHead', 'in_channels': 32, 'in_index': 3, 'num_convs': 1, **HEAD}


@pytest.fixture(scope='module')
def available() -> dict[str, Site]:
    return sites(meta_network(str(MODEL)), vae_scale_factor=4)


def build_and_train(model: dict) -> torch.nn.Module:
    """Build, and take one step's gradients."""
    init_default_scope('mmseg')
    built = MODELS.build(ConfigDict(model)).train()
    losses = built(**built.data_preprocessor(batch(0, 1), True), mode='loss')
    sum(loss for name, loss in losses.items() if 'loss' in name).backward()
    assert all(parameter.grad is not None for parameter in built.parameters() if parameter.requires_grad)
    return built


def test_a_level_for_each_stride_where_the_head_takes_several(available: dict[str, Site]):
    model = segmentor_config(MODEL, {'input_size': 64}, decode_head=UPER, auxiliary_head=AUXILIARY)
    before = model.to_dict()
    config = segmentation_model(model, SELECTED, available)
    assert model.to_dict() == before
    assert config['backbone'] == {
        'type': 'DiffusionBackbone',
        'model': str(MODEL),
        'input_size': 64,
        'layers': list(map(str, FINE_TO_COARSE)),
        'channels': [48, 64, 64, 96],
    }
    assert config['neck']['levels'] == [[48], [64, 64], [96]] and config['neck']['out_channels'] == 32
    assert config['neck']['layer_names'] == [
        [str(FINE_TO_COARSE[0])],
        [*map(str, FINE_TO_COARSE[1:3])],
        [str(SELECTED[2])],
    ]
    assert config['decode_head']['in_channels'] == [32, 32, 32] and config['decode_head']['in_index'] == [0, 1, 2]
    assert config['auxiliary_head']['in_channels'] == 32 and config['auxiliary_head']['in_index'] == 2
    built = build_and_train(config)
    assert [x.shape[2] for x in built.extract_feat(torch.zeros(1, 3, 64, 64))] == [16, 8, 4]


@pytest.mark.parametrize('neck', ['AggregationNeck', 'ConcatNeck'])
def test_one_level_where_the_head_takes_one_map(available: dict[str, Site], neck: str):
    head = {**AUXILIARY, 'in_index': 0}
    model = segmentor_config(MODEL, {'input_size': 64}, decode_head=head)
    if neck == 'ConcatNeck':
        model['neck'] = {'type': neck, 'levels': [[32]], 'timesteps': 3}
    config = segmentation_model(model, SELECTED, available)
    width = 32 if neck == 'AggregationNeck' else 48 + 64 + 64 + 96
    assert config['neck']['type'] == neck and config['neck']['levels'] == [[48, 64, 64, 96]]
    assert config['decode_head']['in_channels'] == width and config['decode_head']['in_index'] == 0
    build_and_train(config)


def test_without_a_neck_the_head_takes_the_maps(available: dict[str, Site]):
    head = {'type': 'PixelClassifierHead', 'in_channels': [32, 32, 64, 64], 'num_classes': 3, 'num_members': 2}
    config = segmentation_model(segmentor_config(MODEL, neck=None, decode_head=head), SELECTED, available)
    assert config['neck'] is None and config['decode_head']['in_channels'] == [48, 64, 64, 96]
    build_and_train(config)


def test_the_cosine_of_the_concatenation_is_the_mean_of_the_cosines(available: dict[str, Site]):
    model = {'type': 'CorrespondenceModel', 'backbone': {'type': 'DiffusionBackbone', 'model': str(MODEL)}}
    model |= {'head': {'type': 'ConvDescriptorHead', 'in_channels': 96}, 'match_size': 64}
    config = correspondence_model(ConfigDict(model), SELECTED, available, output_size=16)
    assert config['match_size'] == 64 and 'head' not in config
    init_default_scope('mmseg')
    built = MODELS.build(ConfigDict(config)).eval()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    maps = built.backbone(images)
    cosines = torch.stack([cosine(resize(x, (16, 16))) for x in maps])  # (L, h*w, h*w)
    torch.testing.assert_close(cosine(built.describe(maps)), cosines.mean(0))
    assert cosines.std(0).max() > 0.1


def cosine(x: torch.Tensor) -> torch.Tensor:
    """Of all cells of two maps (2, C, h, w) with each other."""
    first, second = F.normalize(x.flatten(2), dim=1)
    return first.T @ second


def test_what_cannot_be_made(available: dict[str, Site]):
    model = segmentor_config(MODEL)
    with pytest.raises(ValueError, match='mid-vit-block0-self-map@50 have as many channels'):
        segmentation_model(model, [Candidate('mid-vit-block0-self-map', 50)], available)
    with pytest.raises(ValueError, match='the backbone is a VisionBackbone'):
        segmentation_model({**model, 'backbone': {'type': 'VisionBackbone'}}, SELECTED, available)
    with pytest.raises(ValueError, match='the neck is a FPN'):
        segmentation_model({**model, 'neck': {'type': 'FPN'}}, SELECTED, available)
    with pytest.raises(ValueError, match='FCNHead takes one map, not 4'):
        segmentation_model({**model, 'neck': None, 'decode_head': AUXILIARY}, SELECTED, available)

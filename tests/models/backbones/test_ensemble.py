"""Tests for diffseg.models.backbones.ensemble, and for the offloading of frozen networks."""

import copy
import json
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import ClassVar

import pytest
import tiny_vision
import torch
from gpu import DEVICES
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from tiny_mmseg import CHANNELS, backbone_config, batch, segmentor_config
from torch import nn

from diffseg.models.backbones.ensemble import EnsembleBackbone, join_levels
from diffseg.models.backbones.frozen import FrozenBackbone, freeze


@pytest.fixture(scope='module')
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision.save(tmp_path_factory.mktemp('vision') / 'dinov2')


@pytest.fixture
def members(tiny_pipeline: Path, vit: Path) -> list[dict]:
    """Two levels: two maps of each member, then two and one."""
    return [
        backbone_config(tiny_pipeline, levels=[2, 2]),
        {'type': 'VisionBackbone', 'model': str(vit), 'layers': [1, 2, 3], 'input_size': 32, 'levels': [2, 1]},
    ]


def make_images(batch: int = 2, height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Probe(FrozenBackbone):
    """One map; keeps account of where all probes' networks are while it runs, and where its parameter is."""

    probes: ClassVar[list['Probe']] = []
    seen: ClassVar[list[list[str]]] = []

    def __init__(self, channels: int = 4, checkpointed: bool = False):
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels)).eval()
        self.network[0].gradient_checkpointing = checkpointed
        freeze(self.network)
        self.gain = nn.Parameter(torch.ones(()))
        self.channels = [channels]
        self.fingerprint = {'channels': channels}
        self.probes.append(self)

    def where(self) -> str:
        (device,) = {buffer.device.type for buffer in self.network.buffers()}
        return device

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with self.resident(x.device):
            self.seen.append([probe.where() for probe in self.probes])
            return (self.network(x) * self.gain,)


@pytest.fixture
def make_probes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., EnsembleBackbone]:
    """Make an ensemble of three probes: `make_probes(**options)`."""
    monkeypatch.setattr(Probe, 'probes', [])
    monkeypatch.setattr(Probe, 'seen', [])
    return lambda **options: EnsembleBackbone([{'type': Probe, 'channels': c} for c in (4, 5, 6)], **options)


# Joining


def test_layers_of_members_may_have_timesteps_of_their_own(members: list[dict]):
    layers = members[0]['layers']
    members[0] |= {
        'layers': [f'{layers[0]}@50', f'{layers[1]}@261+500', layers[2], f'{layers[0]}@500'],
        'levels': [2, 2],
    }
    ensemble = EnsembleBackbone(members)
    maps = ensemble(make_images(1))
    steps = [1, 2, 1, 1, 3, 1, 1]  # of the maps, level by level
    assert [x.shape[1] for x in maps] == [t * c for t, c in zip(steps, ensemble.channels, strict=True)]


def test_maps_are_joined_level_by_level():
    assert join_levels(['abc', 'xyz', 'u'], [[2, 0, 1], [1, 2, 0], [0, 0, 1]]) == list('abxyzcu')


@pytest.mark.parametrize('device', DEVICES)
@torch.no_grad()
def test_the_maps_are_those_of_each_backbone_alone(members: list[dict], device: str):
    ensemble = MODELS.build({'type': 'EnsembleBackbone', 'backbones': members}).to(device)
    x = make_images().to(device)
    a, b = (MODELS.build({k: v for k, v in member.items() if k != 'levels'}).to(device)(x) for member in members)
    expected = [a[0], a[1], b[0], b[1], a[2], a[3], b[2]]
    maps = ensemble(x)
    assert len(maps) == len(expected) and all(torch.equal(y, z) for y, z in zip(maps, expected, strict=True))
    steps = [3, 3, 1, 1, 3, 3, 1]
    assert [y.shape[1] for y in maps] == [t * c for t, c in zip(steps, ensemble.channels, strict=True)]
    assert members[0]['levels'] == [2, 2]  # the config is as it was


def test_without_levels_all_maps_are_of_one(members: list[dict]):
    for member in members:
        del member['levels']
    assert EnsembleBackbone(members).channels == [*chain(*CHANNELS), *[tiny_vision.WIDTH] * 3]


@torch.no_grad()
def test_prompts_go_to_the_diffusion_models(members: list[dict]):
    ensemble = EnsembleBackbone(members)
    x, prompts = make_images(), ['a horse', 'a cow']
    alone = ensemble.members[0](x, prompts)
    maps = ensemble(x, prompts)
    assert torch.equal(maps[0], alone[0]) and not torch.equal(maps[1], ensemble(x)[1])
    assert torch.equal(maps[2], ensemble(x)[2])


def test_a_fourth_channel_goes_to_the_members_with_captions(make_probes: Callable):
    ensemble = make_probes()
    images = torch.zeros(2, 4, 8, 8)
    with pytest.raises(RuntimeError, match='4 channels'):
        ensemble(images)
    reader = ensemble.members[1]
    reader.captions = 'a file of captions'
    reader.network[0].weight = torch.zeros(5, 4, 1, 1)
    assert [y.shape[1] for y in ensemble(images)] == [4, 5, 6]


# Errors


@pytest.mark.parametrize(
    ('changes', 'options', 'message'),
    [
        ([{}, {'levels': [2, 2]}], {}, r'backbones\[1\] \(VisionBackbone\): levels=\[2, 2\] do not add up to the 3'),
        ([{}, {'levels': [4, -1]}], {}, r'backbones\[1\] .*levels=\[4, -1\]'),
        ([{}, {'levels': [1, 1, 1]}], {}, r'have \[2, 3\] levels'),
        ([{'layers': ['nowhere']}, {}], {}, r"backbones\[0\] \(DiffusionBackbone\).*unknown activation 'nowhere'"),
        ([{}, {'model': 'dinov2-h'}], {}, r'backbones\[1\] \(VisionBackbone\).*no vision preset'),
        ([], {}, 'backbones is empty'),
        ([{}, {}], {'offload': 'group'}, "offload is 'group'; it is 'sequential'"),
        ([{}, {}], {'offload': 'sequential', 'devices': ['cpu', 'cpu']}, 'exclude each other'),
        ([{}, {}], {'devices': ['cpu']}, 'for 2 backbones; give one for each'),
    ],
)
def test_options_that_cannot_be(members: list[dict], changes: list[dict], options: dict, message: str):
    backbones = [{**member, **change} for member, change in zip(members, changes, strict=False)]
    with pytest.raises(ValueError, match=message):
        EnsembleBackbone(backbones, **options)


def test_backbones_of_others_are_refused():
    init_default_scope('mmseg')
    with pytest.raises(ValueError, match=r'backbones\[0\] \(ResNet\): only the backbones of this package'):
        EnsembleBackbone([{'type': 'ResNet', 'depth': 18}])


def test_images_that_cannot_be_name_the_member(members: list[dict]):
    with pytest.raises(ValueError, match=r'backbones\[0\] \(DiffusionBackbone\): images are in'):
        EnsembleBackbone(members)(make_images() * 200)


@pytest.mark.parametrize(
    'error', [json.JSONDecodeError('no JSON', 'x', 0), UnicodeDecodeError('utf8', b'x', 0, 1, 'bad')]
)
def test_errors_that_a_message_alone_does_not_make_name_the_member(members: list[dict], monkeypatch, error: ValueError):
    ensemble = EnsembleBackbone(members)

    def fail(images):
        raise error

    monkeypatch.setattr(ensemble.members[0], 'forward', fail)
    with pytest.raises(ValueError, match=rf'backbones\[0\] \(DiffusionBackbone\): {re.escape(str(error))}'):
        ensemble(make_images())


# Offloading


def test_at_most_one_network_is_on_the_device(make_probes: Callable):
    ensemble = make_probes(offload='sequential')
    homes = dict(ensemble.named_buffers())
    ensemble.to('meta')  # stands for an accelerator
    maps = ensemble(make_images().to('meta'))
    assert Probe.seen == [['meta', 'cpu', 'cpu'], ['cpu', 'meta', 'cpu'], ['cpu', 'cpu', 'meta']]
    assert all(y.is_meta for y in maps) and all(probe.gain.is_meta for probe in Probe.probes)
    assert all(buffer is homes[name] for name, buffer in ensemble.named_buffers())


def test_networks_return_after_an_error(make_probes: Callable):
    ensemble = make_probes(offload='sequential')
    with pytest.raises(RuntimeError):
        ensemble(torch.zeros(1, 2, 4, 4, device='meta'))
    assert [probe.where() for probe in Probe.probes] == ['cpu'] * 3


def test_the_dtype_of_offloaded_networks_follows(make_probes: Callable):
    ensemble = make_probes(offload='sequential').to('meta', torch.float64)
    network = ensemble.members[0].network
    assert network[0].weight.dtype == torch.float64 and network[0].weight.device.type == 'cpu'
    assert network[1].num_batches_tracked.dtype == torch.int64


def test_members_with_devices_stay_there(make_probes: Callable):
    ensemble = make_probes(devices=['cpu', 'meta', 'cpu']).to('meta').double()
    devices = [[tensor.device.type for tensor in (probe.gain, probe.network[0].weight)] for probe in Probe.probes]
    assert devices == [['cpu', 'cpu'], ['meta', 'meta'], ['cpu', 'cpu']]
    assert {x.dtype for x in ensemble.members.parameters()} == {torch.float64}


def test_gradient_checkpointing_cannot_be_offloaded():
    with pytest.raises(ValueError, match=r'backbones\[0\].*gradient checkpointing'):
        EnsembleBackbone([{'type': Probe, 'checkpointed': True}], offload='sequential')


def test_trained_parts_of_offloaded_members_learn(make_probes: Callable):
    models = {offload: make_probes(offload=offload) for offload in (None, 'sequential')}
    models['sequential'].load_state_dict(models[None].state_dict())
    for theirs, ours in zip(models[None].buffers(), models['sequential'].buffers(), strict=True):
        ours.copy_(theirs)
    for model in models.values():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            sum(y.square().mean() for y in model(make_images())).backward()
            optimizer.step()
    gains = [[probe.gain.item() for probe in model.members] for model in models.values()]
    assert gains[0] == gains[1] and 1.0 not in gains[0]


@torch.no_grad()
def test_a_copy_shares_the_resting_networks(make_probes: Callable):
    ensemble = make_probes(offload='sequential')
    clone = copy.deepcopy(ensemble)
    assert all(a is b for a, b in zip(ensemble.buffers(), clone.buffers(), strict=True))
    clone(make_images().to('meta'))
    assert [probe.where() for probe in Probe.probes] == ['cpu'] * 3


@torch.no_grad()
def test_cached_maps_do_not_wake_the_network(members: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for member in members:
        member['cache'] = {'path': str(tmp_path), 'dtype': 'float32'}
    ensemble = EnsembleBackbone(members, offload='sequential')
    cold = ensemble(make_images())
    monkeypatch.setattr(FrozenBackbone, 'resident', None)
    assert all(torch.equal(a, b) for a, b in zip(cold, ensemble(make_images()), strict=True))


# In a segmentor


def build_segmentor(members: list[dict], seed: int = 0, **options) -> nn.Module:
    """EncoderDecoder of the ensemble of three timesteps and one, AggregationNeck and FCNHead."""
    init_default_scope('mmseg')
    torch.manual_seed(seed)
    config = segmentor_config(Path('unused'))
    config.backbone = {'type': 'EnsembleBackbone', 'backbones': members, **options}
    config.neck.levels = [[*CHANNELS[0], tiny_vision.WIDTH, tiny_vision.WIDTH], [*CHANNELS[1], tiny_vision.WIDTH]]
    config.neck.timesteps = [[3, 3, 1, 1], [3, 3, 1]]
    return MODELS.build(config)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([result.seg_logits.data for result in model.eval().test_step(batch(5, 6))])


@pytest.fixture
def trained(members: list[dict]) -> nn.Module:
    return train(build_segmentor(members))


def train(model: nn.Module) -> nn.Module:
    optim_wrapper = build_optim_wrapper(model, {'optimizer': {'type': 'SGD', 'lr': 0.05}})
    for i in range(3):
        model.train().train_step(batch(2 * i, 2 * i + 1), optim_wrapper)
    return model


def test_trains_and_loads_strictly_to_the_same_bits(members: list[dict], trained: nn.Module):
    start = build_segmentor(members)
    moved = [not torch.equal(a, b) for a, b in zip(start.parameters(), trained.parameters(), strict=True)]
    assert all(moved)
    state = trained.state_dict()
    assert [name for name in state if name.startswith('backbone')] == [
        'backbone.members.0._extra_state',
        'backbone.members.1._extra_state',
    ]
    loaded = build_segmentor(members, seed=1)
    loaded.load_state_dict(state, strict=True)
    assert torch.equal(logits(loaded), logits(trained))


def test_offloading_changes_no_bit(members: list[dict], trained: nn.Module):
    assert torch.equal(logits(train(build_segmentor(members, offload='sequential'))), logits(trained))


@pytest.mark.parametrize('device', DEVICES)
def test_offloading_under_autocast(members: list[dict], device: str):
    x = make_images().to(device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        plain, offloaded = (
            EnsembleBackbone(members, offload=offload).to(device)(x) for offload in (None, 'sequential')
        )
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(plain, offloaded, strict=True))


def test_a_checkpoint_of_other_members_names_the_one(members: list[dict], trained: nn.Module):
    members[1]['layernorm'] = False
    with pytest.raises(ValueError, match=r'another backbones\[1\] \(VisionBackbone\): layernorm was True and is False'):
        build_segmentor(members).load_state_dict(trained.state_dict())


def test_init_weights_leaves_the_networks(members: list[dict]):
    model = build_segmentor(members)
    before = {name: buffer.clone() for name, buffer in model.backbone.named_buffers()}
    model.init_weights()
    model.train()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.backbone.named_buffers())
    assert not any(module.training for member in model.backbone.members for module in member.network.modules())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_on_a_gpu_one_network_at_a_time(members: list[dict]):
    device = torch.device('cuda')
    everywhere = EnsembleBackbone(members).to(device)
    x = make_images().to(device)
    expected = everywhere(x)
    del everywhere
    before = torch.cuda.memory_allocated()
    ensemble = EnsembleBackbone(members, offload='sequential').to(device)
    assert torch.cuda.memory_allocated() - before < 2**20
    maps = ensemble(x)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    assert all(buffer.is_pinned() for member in ensemble.members for buffer in member.network.buffers())
    assert torch.cuda.memory_allocated() - before - sum(y.nbytes for y in maps) < 2**20
    apart = EnsembleBackbone(members, devices=['cuda', 'cpu']).to(device)
    assert all(y.device.type == 'cuda' for y in apart(x))

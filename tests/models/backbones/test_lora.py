"""Tests of training layers of low rank in a DiffusionBackbone, and of diffseg.diffusion.lora."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmseg.registry import MODELS
from tiny_mmseg import backbone_config
from torch import nn

import diffseg.diffusion.lora
from diffseg.models import DiffusionBackbone

LAYER = 'up-level1-repeat1-vit-block0-cross-q'
QUERY = 'up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q'


@pytest.fixture
def make(tiny_pipeline: Path) -> Callable[..., DiffusionBackbone]:
    """Build the backbone of `tiny_mmseg` with layers of rank 4, at one timestep."""

    def build(**options) -> DiffusionBackbone:
        return MODELS.build(backbone_config(tiny_pipeline, **{'timesteps': [50], 'lora': {'r': 4}, **options}))

    return build


def make_images() -> torch.Tensor:
    return torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1


def step(backbone: DiffusionBackbone) -> None:
    """One step of training on something or other."""
    sum(x.square().mean() for x in backbone.train()(make_images())).backward()
    torch.optim.SGD(backbone.parameters(), lr=1.0).step()


def trained(backbone: DiffusionBackbone) -> DiffusionBackbone:
    """The backbone, its new layers no longer zero."""
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    return backbone


def same(a: DiffusionBackbone, b: DiffusionBackbone) -> bool:
    images = make_images()
    return all(torch.equal(x, y) for x, y in zip(a(images), b(images), strict=True))


def test_it_starts_as_the_frozen_network(make: Callable):
    assert same(make(), make(lora=None))


def test_new_layers_train_and_nothing_else(make: Callable):
    backbone = make()
    assert all('.lora_' in name for name, _ in backbone.named_parameters())
    before = {name: x.clone() for name, x in (*backbone.named_parameters(), *backbone.named_buffers())}
    step(backbone)
    step(backbone)  # lora_A has a gradient once lora_B is not zero
    after = dict((*backbone.named_parameters(), *backbone.named_buffers()))
    assert all(torch.equal(after[name], x) != ('.lora_' in name) for name, x in before.items())


def test_what_no_layer_depends_on_gets_none(make: Callable):
    names = [name for name, _ in make(layers=[LAYER]).named_parameters()]
    assert any(QUERY in name for name in names)
    assert not any(part in name for name in names for part in ('up_blocks.2', QUERY.replace('to_q', 'to_k')))


def test_an_activation_that_is_read_where_a_layer_was_added(make: Callable):
    """The queries are those of W + alpha / r * B A."""
    backbone, plain = (make(layers=[LAYER], lora=lora) for lora in ({'target_modules': [QUERY], 'lora_alpha': 6}, None))
    query, base = trained(backbone).extractor.network.get_submodule(QUERY), plain.extractor.network.get_submodule(QUERY)
    assert len(list(backbone.parameters())) == 2
    base.weight += 6 / 8 * query.lora_B['default'].weight @ query.lora_A['default'].weight
    with torch.no_grad():
        torch.testing.assert_close(backbone(make_images()), plain(make_images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('target', ['up_blocks.1.*.to_q', 'conv2', 'conv_in', 'ff.net.0.proj'])
def test_targets_are_ends_of_names(make: Callable, target: str):
    backbone = make(lora={'r': 2, 'target_modules': [target]})
    names = [name.split('.lora_')[0].removeprefix('extractor.network.') for name, _ in backbone.named_parameters()]
    assert names and all(name.endswith(target.split('*')[-1]) for name in names)
    assert all(name.startswith('up_blocks.1.') for name in names) == target.startswith('up_')
    step(backbone)
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    described = [site.channels for site in backbone.extractor.describe(tokens=None).values()]
    assert described == backbone.channels == make(lora=None).channels


def test_beside_half_precision_it_is_in_single_precision(make: Callable):
    backbone = make(dtype='bfloat16')
    step(backbone)
    assert backbone.fingerprint['dtype'] == 'bfloat16'
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_gradient_checkpointing_gives_the_same_gradients(make: Callable):
    torch.manual_seed(0)
    plain = trained(make())
    recomputed = make(gradient_checkpointing=True)
    recomputed.load_state_dict(plain.state_dict(), strict=True)
    for backbone in (plain, recomputed):
        step(backbone)
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# ---- checkpoints and copies


def test_new_layers_are_in_the_checkpoint(make: Callable):
    source, target = trained(make()), make()
    state = source.state_dict()
    assert set(state) == {'_extra_state', *(name for name, _ in source.named_parameters())}
    target.load_state_dict(state, strict=True)
    assert same(source, target)


@pytest.mark.parametrize('lora', [{'r': 2}, {'r': 4, 'lora_alpha': 8}, {'r': 4, 'target_modules': ['to_q']}, None])
def test_a_checkpoint_with_other_layers_is_refused(make: Callable, lora: dict | None):
    with pytest.raises(ValueError, match=r"belongs to another backbone: lora was \{'r': 4, .* and is "):
        make(lora=lora).load_state_dict(make().state_dict(), strict=False)


def test_a_checkpoint_of_the_frozen_network_can_be_the_start(make: Callable):
    missing, _ = make().load_state_dict(make(lora=None).state_dict(), strict=False)
    assert missing and all('.lora_' in name for name in missing)


def test_a_copy_shares_the_frozen_tensors_only(make: Callable):
    backbone = trained(make())
    clone = copy.deepcopy(backbone)
    frozen, own = dict(backbone.named_buffers()), dict(backbone.named_parameters())
    assert all(x.data_ptr() == frozen[name].data_ptr() for name, x in clone.named_buffers())
    assert all(x.data_ptr() != own[name].data_ptr() for name, x in clone.named_parameters())
    assert same(backbone, clone)


# ---- errors


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'lora': {'r': 0}}, 'rank r of LoRA is 0'),
        ({'lora': {'target_modules': ['to_qkv']}}, r"\['to_qkv'\] of LoRA name no linear layer"),
        ({'lora': {'target_modules': ['conv_out']}}, 'chosen layers depend on; such are'),
        ({'frozen': False}, 'lora is for a frozen UNet'),
        ({'cache': 'cache'}, 'cannot be cached'),
    ],
)
def test_options_that_cannot_be(make: Callable, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_without_peft(make: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diffseg.diffusion.lora, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'diffseg\[lora\]'"):
        make()

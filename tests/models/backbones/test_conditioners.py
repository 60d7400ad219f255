"""Tests for diffseg.models.backbones.conditioners, and of conditioners in a backbone."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmseg.registry import MODELS
from tiny_mmseg import LAYERS, backbone_config, batch, build_segmentor

from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.models import DiffusionBackbone, LearnedPrompts, TextAdapter
from diffseg.models.backbones.conditioners import build_prompt

LEARNED = {'type': 'LearnedPrompts', 'num_prompts': 5, 'dim': 32}
CLASSES = {'classes': ['horse', 'dog', 'traffic light'], 'templates': ['a photo of a {}.', 'the {}']}


@pytest.fixture
def adapter(tiny_pipeline: Path) -> dict:
    """Config of a TextAdapter."""
    return {'type': 'TextAdapter', 'model': str(tiny_pipeline), **CLASSES}


@pytest.fixture
def make(tiny_pipeline: Path) -> Callable[..., DiffusionBackbone]:
    """Build the backbone of `tiny_mmseg` with other options."""

    def build(conditioner=LEARNED, **options) -> DiffusionBackbone:
        return MODELS.build(backbone_config(tiny_pipeline, conditioner=conditioner, **options))

    return build


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96) * 2 - 1


OPTIONS = {
    'one timestep': {'timesteps': [50]},
    'three timesteps': {},
    'ensemble in parts': {'ensemble': 2, 'micro_batch': 3},
    'checkpointing': {'gradient_checkpointing': True},
    'early stop': {'layers': LAYERS[3:], 'timesteps': [50]},
    'several calls': {'trajectory': {'type': 'inversion', 'steps': 4}, 'timesteps': [-1, 250]},
}


def gradients(backbone: DiffusionBackbone, images: torch.Tensor) -> dict[str, torch.Tensor]:
    sum(x.square().mean() for x in backbone.train()(images)).backward()
    return {name: parameter.grad for name, parameter in backbone.named_parameters()}


@pytest.mark.parametrize(('kind', 'options'), [*(('learned', name) for name in OPTIONS), ('adapter', 'one timestep')])
def test_everything_learns_through_a_frozen_unet(make, adapter, images, kind, options):
    backbone = make(LEARNED if kind == 'learned' else adapter, **OPTIONS[options])
    assert all(name.startswith('conditioner.') for name, _ in backbone.named_parameters())
    before = copy.deepcopy(dict(backbone.named_parameters()))
    frozen = {name: buffer.clone() for name, buffer in backbone.extractor.named_buffers()}
    gradients(backbone, images)
    torch.optim.SGD(backbone.parameters(), lr=100.0).step()
    after = dict(backbone.named_parameters())
    assert len(after) == (1 if kind == 'learned' else 5)
    assert not [name for name in after if torch.equal(before[name], after[name])]
    assert all(torch.equal(buffer, frozen[name]) for name, buffer in backbone.extractor.named_buffers())


@pytest.mark.parametrize('options', ['ensemble in parts', 'checkpointing'])
def test_gradients_do_not_depend_on_how_they_are_computed(make, images, options):
    backbone = make(**OPTIONS[options])
    plain = make(ensemble=backbone.extractor.ensemble)
    plain.load_state_dict(backbone.state_dict())
    ours, theirs = (gradients(each, images)['conditioner.embeds'] for each in (backbone, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_prompts_condition_the_unet(make, tiny_pipeline, images):
    backbone = make()
    embedding = backbone.conditioner.embeds.detach()
    expected = DiffusionExtractor(str(tiny_pipeline), LAYERS, [50, 261, 500], prompt=embedding)(images)
    for ours, x in zip(backbone(images), expected.values(), strict=True):
        torch.testing.assert_close(ours, x.flatten(1, 2))


def test_it_learns_in_a_segmentor(tiny_pipeline, adapter):
    model = build_segmentor(tiny_pipeline, backbone={'conditioner': adapter})
    before = copy.deepcopy(dict(model.named_parameters()))
    data = model.data_preprocessor(batch(0, 1), training=True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e4).step()
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]


def test_it_is_trained_together_with_parts_of_the_unet(make, images):
    backbone = make(frozen=False, trainable=['up_blocks.1.*.attn2.to_k.*'], layers=LAYERS[:1], timesteps=[50])
    assert len(dict(backbone.named_parameters())) == 4
    assert all(gradient.abs().sum() > 0 for gradient in gradients(backbone, images).values())


def test_checkpoints_hold_it(make, adapter, images):
    learned, first, second = make(), make(adapter), make(adapter)
    for parameter in first.conditioner.parameters():
        torch.nn.init.normal_(parameter)
    state = first.state_dict()
    assert {f'conditioner.{name}' for name in ('gamma', 'mlp.0.weight', 'texts')} <= set(state)
    second.load_state_dict(state, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(first(images), second(images), strict=True))
    with pytest.raises(ValueError, match=r'conditioner was .*LearnedPrompts'):
        second.load_state_dict(learned.state_dict(), strict=False)


def test_fixed_prompts_are_saved_and_not_trained(make, images):
    fixed = {**LEARNED, 'trainable': False}
    first, second = make(fixed), make(fixed)
    assert not list(first.parameters()) and not torch.equal(first(images)[0], second(images)[0])
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first(images)[0], second(images)[0])
    assert not first(images)[0].requires_grad


def test_it_keeps_its_values_when_mmengine_initialises_the_model(tiny_pipeline):
    model = build_segmentor(tiny_pipeline, backbone={'conditioner': LEARNED})
    before = model.backbone.conditioner.embeds.clone()
    model.init_weights()
    assert torch.equal(model.backbone.conditioner.embeds, before)


def test_a_copy_learns_on_its_own(make):
    backbone = make()
    clone = copy.deepcopy(backbone)
    assert torch.equal(clone.conditioner.embeds, backbone.conditioner.embeds)
    assert clone.conditioner.embeds is not backbone.conditioner.embeds


def test_sdxl_needs_a_pooled_embedding(tiny_sdxl_pipeline, images):
    config = {'type': 'LearnedPrompts', 'num_prompts': 5, 'dim': 64, 'pooled_dim': 32}
    layer = 'down-level1-repeat1-vit-out'

    def build(**conditioner) -> DiffusionBackbone:
        options = backbone_config(tiny_sdxl_pipeline, layers=[layer], timesteps=[50])
        return MODELS.build({**options, 'conditioner': {**config, **conditioner}})

    found = gradients(build(), images)
    assert set(found) == {'conditioner.embeds', 'conditioner.pooled'}
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    with pytest.raises(ValueError, match=r"'pooled_dim': None\}, but the network of this model .*'pooled_dim': 32"):
        build(pooled_dim=None)


@pytest.mark.parametrize(('kind', 'sizes'), [('flux', (32, 32)), ('pixart-sigma', (16, None))])
def test_prompts_are_learned_through_transformers(pipeline_folder, images, kind, sizes):
    conditioner = {'type': 'LearnedPrompts', 'num_prompts': 5, 'dim': sizes[0], 'pooled_dim': sizes[1]}
    options = {'model': str(pipeline_folder(kind)), 'layers': ['vit-block1-out'], 'timesteps': [50]}
    backbone = DiffusionBackbone(**options, conditioner=conditioner)
    before = {name: x.clone() for name, x in backbone.named_parameters() if x.requires_grad}
    assert list(before) == [f'conditioner.{name}' for name in ('embeds', 'pooled')[: 1 + (sizes[1] is not None)]]
    optimizer = torch.optim.SGD([x for x in backbone.parameters() if x.requires_grad], lr=1)
    sum(x.square().mean() for x in backbone(images)).backward()
    optimizer.step()
    assert not any(torch.equal(x, before[name]) for name, x in backbone.named_parameters() if name in before)


def test_class_labels_are_not_learned(pipeline_folder):
    with pytest.raises(ValueError, match='reads a class label, not a prompt; leave out the conditioner'):
        DiffusionBackbone(str(pipeline_folder('dit')), ['vit-block1-out'], [50], conditioner=LEARNED)


def test_attention_to_learned_prompts_has_their_number_of_channels(make, images):
    attention = {'attention_maps': ['up_cross', 'down_cross'], 'attention_mode': 'average'}
    backbone = make(**attention, timesteps=[1], trajectory='clean', channels=[32, 32, 64, 64, 5, 5])
    assert backbone.channels == [32, 32, 64, 64, 5, 5]
    assert [x.shape[1] for x in backbone(images)] == backbone.channels
    assert make(attention_maps=['up_cross']).channels[-1] == 10


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'conditioner': {**LEARNED, 'dim': 768}}, r"'dim': 768, .* needs \{'dim': 32"),
        ({'conditioner': {**LEARNED, 'pooled_dim': 8}}, r"'pooled_dim': 8\}"),
        ({'prompt': 'a horse'}, "leave out prompt='a horse'"),
        ({'layers': ['down-level0-repeat0-res-out']}, r"depends on \['embeds'\] of LearnedPrompts"),
        ({'cache': 'features'}, 'state of LearnedPrompts'),
    ],
)
def test_what_cannot_be(make, monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        make(**options)


# ---- the text adapter


def test_tokens_start_as_the_classes(adapter):
    adapter.pop('type')
    module = TextAdapter(**adapter, gamma=0)
    tokens = module().embeds
    assert tokens.shape == (1, 3, 32) and torch.equal(tokens[0], module.texts)
    module.gamma.data.fill_(0.5)
    torch.testing.assert_close(module().embeds[0], module.texts + 0.5 * module.mlp(module.texts))
    assert module.fingerprint != TextAdapter(**{**adapter, 'classes': ['cat']}).fingerprint


def test_classes_of_a_data_set(tiny_pipeline):
    module = TextAdapter(str(tiny_pipeline), dataset='CityscapesDataset', templates=['{}'])
    assert module.num_prompts == 19
    for options in ({}, {'dataset': 'CityscapesDataset', **CLASSES}):
        with pytest.raises(ValueError, match='give one of them'):
            TextAdapter(str(tiny_pipeline), **options)


# ---- prompts


def test_the_names_of_classes_as_a_prompt(tiny_pipeline):
    prompt = build_prompt({'type': 'class_names', 'dataset': 'ADE20KDataset'})
    assert prompt.startswith('wall, building, sky, ') and prompt.endswith(', flag') and prompt.count(', ') == 149
    described = {'type': 'class_names', 'dataset': 'PascalVOCDataset', 'template': 'a {}'}
    assert build_prompt(described).startswith('a background, a aeroplane, a bicycle')
    backbone = MODELS.build(backbone_config(tiny_pipeline, prompt=described))
    assert backbone.fingerprint['prompt'] == [build_prompt(described)]
    assert build_prompt('a horse') == 'a horse' and build_prompt(['a', 'b']) == ['a', 'b']


@pytest.mark.parametrize(
    ('prompt', 'message'),
    [
        ({'type': 'names'}, "type 'names'; there are class_names, captions"),
        ({'dataset': 'ADE20KDataset'}, 'type None'),
        ({'type': 'class_names', 'dataset': 'ADE'}, "no data set 'ADE'; registered are .*ADE20KDataset"),
        ({'type': 'class_names', 'dataset': 'BaseSegDataset'}, 'no class names'),
        ({'type': 'class_names', 'dataset': 'ADE20KDataset', 'template': 'a'}, "template 'a' has no"),
    ],
)
def test_prompts_that_are_none(prompt, message):
    with pytest.raises(ValueError, match=message):
        build_prompt(prompt)


def test_a_trained_unet_with_several_prompts(tiny_pipeline, images):
    prompts = ['a horse', 'a dog']
    options = {'layers': LAYERS[:1], 'timesteps': [50], 'prompt': prompts}
    backbone = MODELS.build(backbone_config(tiny_pipeline, **options, frozen=False))
    frozen = MODELS.build(backbone_config(tiny_pipeline, **options))
    torch.testing.assert_close(backbone(images, prompts)[0], frozen(images, prompts)[0])


def test_learned_prompts_are_normal():
    embeds = LearnedPrompts(1000, 64)().embeds
    assert embeds.shape == (1, 1000, 64)
    torch.testing.assert_close(embeds.std(), torch.tensor(1.0), atol=0.02, rtol=0)

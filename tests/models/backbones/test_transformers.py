"""Tests of DiffusionBackbone on transformers: maps, prompts, cache and training."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.runner.checkpoint import load_checkpoint, save_checkpoint
from mmseg.registry import MODELS
from tiny_pipelines import KINDS, QUICK

from diffseg.diffusion.embeddings import save_conditioning
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import extend_images
from diffseg.diffusion.sites import sites
from diffseg.geometry import fit_to_image
from diffseg.models import DiffusionBackbone
from diffseg.models.captions import append_rows

HORSE, DOG = 'a photo of a horse', 'two dogs'
FLOW = ('flux', 'sd3', 'sana', 'z-image')
CLOSE = {'rtol': 1e-4, 'atol': 1e-5}


@pytest.fixture
def make(pipeline_folder: Callable[[str], Path]) -> Callable[..., DiffusionBackbone]:
    """Build a backbone that reads the second block of a tiny pipeline: `make(kind, **options)`."""

    return lambda kind, **options: MODELS.build(backbone_config(pipeline_folder(kind), kind, **options))


def backbone_config(folder: Path, kind: str, **options) -> dict:
    defaults = {'layers': ['vit-block1-out'], 'timesteps': [260], 'prompt': '' if kind == 'dit' else HORSE}
    return {'type': 'DiffusionBackbone', 'model': str(folder), **defaults, **options}


def images(batch: int = 1, height: int = 32, width: int = 64) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max() > 1e-4 * b.abs().max()


# ---- maps


@pytest.mark.parametrize('kind', KINDS)
def test_maps_tile_images_of_any_size(make: Callable, kind: str):
    """They are those of the image that is continued by hand, at the centres of cells that tile the image."""
    backbone, x = make(kind, layers=['vit-block0-mod', 'transformer-out']), images(1, 37, 75)
    maps = backbone(x)
    continued = extend_images(x, backbone.extractor.multiple)
    strides = [site.stride for site in backbone.extractor.sites.values()]
    assert [map.shape[-2:] for map in maps] == [(-(-37 // stride), -(-75 // stride)) for stride in strides]
    for ours, by_hand, stride in zip(maps, backbone(continued), strides, strict=True):
        torch.testing.assert_close(ours, fit_to_image(by_hand, stride, (37, 75)), **CLOSE)


@pytest.mark.parametrize('kind', QUICK)
def test_values_do_not_depend_on_batches(make: Callable, kind: str):
    """Neither on that of images, nor on how ensemble and timesteps are cut into calls of the network."""
    x = images(2)
    options = {'ensemble': 2, 'timesteps': [260, 500]}
    together = make(kind, **options)(x)[0]
    assert together.shape == (2, 2 * make(kind).channels[0], 2, 4)
    torch.testing.assert_close(make(kind, **options)(x[1:])[0], together[1:], **CLOSE)
    torch.testing.assert_close(make(kind, **options, micro_batch=1)(x)[0], together, **CLOSE)
    assert differ(make(kind, timesteps=[260, 500])(x)[0], together)


@pytest.mark.parametrize('kind', FLOW)
def test_timesteps_are_sigmas_or_indices(make: Callable, kind: str):
    x = images()
    backbone = make(kind, layers=['vit-block0-out@0.26', 'vit-block1-out@0.26+500'], timesteps=None)
    assert backbone.extractor.timesteps == (260, 500) and backbone.layers == ['vit-block0-out@260', 'vit-block1-out']
    narrow, wide = backbone(x)
    same = make(kind, layers=['vit-block0-out', 'vit-block1-out'], timesteps=[0.26, 0.5])(x)
    width = backbone.channels[0]
    torch.testing.assert_close(same[0][:, :width], narrow, **CLOSE)
    torch.testing.assert_close(same[1], wide, **CLOSE)
    assert differ(wide[:, :width], wide[:, width:])


def test_input_size(make: Callable):
    backbone = make('flux', input_size=(64, 32))
    assert backbone(images(1, 40, 50))[0].shape[-2:] == (4, 2)


@pytest.mark.parametrize('kind', QUICK)
def test_a_call_that_ends_with_the_last_layer_gives_what_a_whole_one_does(make: Callable, kind: str):
    x, first = images(), ['vit-block0-out']
    assert torch.equal(make(kind, layers=first)(x)[0], make(kind, layers=[*first, 'transformer-out'])(x)[0])


@pytest.mark.parametrize('kind', QUICK)
def test_other_layers_are_read_with_the_same_network(make: Callable, kind: str):
    backbone, x = make(kind), images()
    other, expected = (
        backbone.reading(['vit-block0-mod'], [500]),
        make(kind, layers=['vit-block0-mod'], timesteps=[500]),
    )
    assert other.extractor.network is backbone.extractor.network
    assert other.fingerprint == expected.fingerprint and other.channels == expected.channels
    assert torch.equal(other(x)[0], expected(x)[0])


@pytest.mark.parametrize('kind', ['sd3', 'flux', 'qwen-image', 'sana'])
def test_how_it_is_run_changes_no_values(make: Callable, kind: str):
    expected = make(kind)(images(2))[0]
    plain = {'vae_slicing': True, 'memory_format': 'channels_last', 'vae_tiling': True}
    torch.testing.assert_close(make(kind, **plain)(images(2))[0], expected, **CLOSE)

    compiled = make(kind, compile={'backend': 'eager'})
    torch.testing.assert_close(compiled(images(2))[0], expected, **CLOSE)
    network = compiled.extractor.network
    blocks = {site.block for site in sites(network).values() if site.block}
    compiled_blocks = {name for name in blocks if network.get_submodule(name)._compiled_call_impl is not None}
    assert blocks - compiled_blocks == {'transformer_blocks.1'}  # which is read


@pytest.mark.parametrize('kind', QUICK)
def test_beside_other_backbones_under_necks_and_heads(
    make: Callable, pipeline_folder: Callable, tiny_pipeline: Path, kind: str
):
    """In an ensemble with a UNet, whose networks take turns; under AggregationNeck and a head of mmseg."""
    members = [
        backbone_config(pipeline_folder(kind), kind, levels=[1]),
        backbone_config(tiny_pipeline, 'sd15', layers=['dift-0'], timesteps=[50], levels=[1]),
    ]
    ensemble = MODELS.build({'type': 'EnsembleBackbone', 'backbones': members, 'offload': 'sequential'})
    maps = ensemble(images())
    assert torch.equal(maps[0], make(kind)(images())[0])

    torch.manual_seed(0)
    channels = make(kind).channels[0]
    neck = MODELS.build(
        {'type': 'AggregationNeck', 'levels': [[channels]], 'timesteps': 1, 'out_channels': 16, 'num_groups': 4}
    )
    head = MODELS.build(
        {'type': 'PixelClassifierHead', 'in_channels': [16], 'num_classes': 3, 'num_members': 2, 'hidden': (8, 4)}
    ).eval()
    logits = head(neck(maps[:1]), (32, 64))
    assert logits.shape == (1, 3, 32, 64) and logits.sum(dim=1).eq(2).all()  # votes of two members


# ---- prompts and the cache of maps


@pytest.mark.parametrize('kind', QUICK)
def test_prompts_of_images(make: Callable, pipeline_folder: Callable, tmp_path: Path, kind: str):
    """Captions and files of embeddings give the maps of the same prompts, which other prompts do not."""
    x = images(2)
    (tmp_path / 'captions.json').write_text('{"a": "a photo of a horse", "b": "two dogs"}')
    captions = make(kind, prompt={'type': 'captions', 'file': str(tmp_path / 'captions.json')})
    both = captions(append_rows(x, [0, 1]))[0]
    alone = [make(kind, prompt=prompt)(x[i : i + 1])[0][0] for i, prompt in enumerate((HORSE, DOG))]
    torch.testing.assert_close(both, torch.stack(alone), **CLOSE)
    assert differ(make(kind, prompt=DOG)(x[:1])[0][0], alone[0])

    extractor = DiffusionExtractor(pipeline_folder(kind), ['transformer-out'], [260], prompt=DOG)
    save_conditioning(tmp_path / 'dog.safetensors', extractor.conditioning)
    embedding = {'type': 'embedding', 'path': str(tmp_path / 'dog.safetensors')}
    assert torch.equal(make(kind, prompt=embedding)(x[1:])[0][0], alone[1])


CACHED = {
    'prompt': ('flux', {'prompt': DOG}),
    'sequence length': ('flux', {'max_sequence_length': 16}),
    'embedded guidance': ('flux', {'embedded_guidance': 1.5}),
    'discarded channels': ('flux', {'layers': ['vit-block1-mod'], 'discard': [3]}),
    'class': ('dit', {'label': 2}),
    'timestep': ('sd3', {'timesteps': [0.261]}),
}


@pytest.mark.parametrize(('kind', 'options'), CACHED.values(), ids=CACHED)
def test_a_cache_serves_its_own_settings_alone(
    make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict
):
    x, cache = images(), {'path': str(tmp_path), 'dtype': 'float32'}
    layers = {'layers': options['layers']} if 'layers' in options else {}
    first = make(kind, cache=cache, **layers)
    maps = first(x)[0]
    other = make(kind, cache=cache, **options)
    changed = other(x)[0]
    assert torch.equal(changed, make(kind, **options)(x)[0])
    assert differ(changed, maps)
    monkeypatch.setattr(DiffusionExtractor, 'forward', None)
    assert torch.equal(make(kind, cache=cache, **layers)(x)[0], maps)
    assert torch.equal(make(kind, cache=cache, **options)(x)[0], changed)


# ---- checkpoints and training


@pytest.mark.parametrize('kind', QUICK)
def test_checkpoints_hold_the_fingerprint_and_refuse_another(make: Callable, tmp_path: Path, kind: str):
    backbone = make(kind)
    save_checkpoint({'state_dict': backbone.state_dict()}, str(tmp_path / 'a.pth'))
    load_checkpoint(make(kind), str(tmp_path / 'a.pth'), strict=True)
    with pytest.raises(ValueError, match='belongs to another backbone: timesteps was'):
        load_checkpoint(make(kind, timesteps=[261]), str(tmp_path / 'a.pth'))


@pytest.mark.parametrize(
    ('part', 'kind'), [*(('parameters', kind) for kind in QUICK), *(('lora', kind) for kind in KINDS)]
)
def test_parts_train(make: Callable, kind: str, part: str):
    """All that is chosen gets the gradient that it gets under gradient checkpointing, and is in the checkpoint."""
    last = {'lumina2': 'layers', 'z-image': 'layers', 'hunyuan-dit': 'blocks', 'auraflow': 'joint_transformer_blocks'}
    options = {'frozen': False, 'trainable': [f'{last.get(kind, "transformer_blocks")}.0.*']}
    options = {'lora': {'r': 2}} if part == 'lora' else options
    gradients, state = [], None
    for checkpointing in (False, kind != 'hunyuan-dit'):  # diffusers has none for it
        backbone = make(kind, gradient_checkpointing=checkpointing, **options).train()
        if state is None:
            torch.manual_seed(0)
            for parameter in backbone.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            state = {name: x.clone() for name, x in backbone.state_dict().items()}  # as of a file of tensors alone
        backbone.load_state_dict(state, strict=True)
        maps = backbone(images(2))
        maps[0].square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in backbone.named_parameters()})
    assert set(state) == {'_extra_state', *gradients[0]}
    assert differ(maps[0].detach(), make(kind)(images(2))[0])
    for name, plain in gradients[0].items():
        assert plain is not None and plain.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], plain)


@pytest.mark.parametrize('kind', QUICK)
def test_training_under_autocast_and_beside_half_precision(make: Callable, kind: str):
    for options in ({}, {'dtype': 'bfloat16'}):
        backbone = make(kind, lora={'r': 2}, **options).train()
        with torch.autocast('cpu', torch.bfloat16, enabled=not options):
            loss = backbone(images())[0].float().square().mean()
        loss.backward()
        assert {parameter.grad.dtype for parameter in backbone.parameters()} == {torch.float32}
        assert all(parameter.grad.isfinite().all() for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ('kind', 'options', 'message'),
    [
        ('hunyuan-dit', {'gradient_checkpointing': True}, 'no gradient checkpointing for a HunyuanDiT2DModel; leave'),
        ('flux', {'lora': {'target_modules': ['to_qkv']}}, r"\['to_qkv'\] of LoRA name no linear layer"),
        ('pixart-sigma', {'lora_weights': ['lora.safetensors']}, 'no LoRA weights for a PixArtTransformer2DModel'),
        ('flux', {'type': 'MetaPromptsBackbone', 'prompt': ''}, 'is a transformer; choose a Stable'),
        ('hunyuan-dit', {'conditioner': {'type': 'LearnedPrompts'}, 'prompt': ''}, 'reads two sequences of tokens'),
        ('flux', {'frozen': False, 'trainable': ['up_blocks.*']}, r"\['up_blocks.\*'\] select no parameter"),
    ],
)
def test_options_that_cannot_be(make: Callable, kind: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make(kind, **options)

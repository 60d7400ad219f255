"""Tests for diffseg.models.backbones.diffusion."""

import copy
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import tiny
import torch
from fake_device import fake_device
from mmengine.model import ExponentialMovingAverage, convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.runner.checkpoint import load_checkpoint, save_checkpoint
from mmseg.registry import MODELS
from safetensors.torch import load_file, save_file
from tiny_mmseg import CHANNELS, LAYERS, TIMESTEPS, backbone_config
from torch import nn
from torch.nn import functional as F

from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.models import DiffusionBackbone

LAYER = 'up-level1-repeat1-vit-block0-cross-q'
TRAINABLE = ['up_blocks.1.resnets.1.*', 'time_embedding.*']


@pytest.fixture
def make(tiny_pipeline: Path) -> Callable[..., DiffusionBackbone]:
    """Build the backbone of `tiny_mmseg` with other options."""

    def build(**options) -> DiffusionBackbone:
        return MODELS.build(backbone_config(tiny_pipeline, **options))

    return build


def make_images(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1


def frozen_tensors(backbone: DiffusionBackbone) -> dict[str, torch.Tensor]:
    """Copies of all frozen tensors."""
    return {name: buffer.clone() for name, buffer in backbone.extractor.named_buffers()}


def assert_untouched(backbone: DiffusionBackbone, before: dict[str, torch.Tensor]) -> None:
    after = frozen_tensors(backbone)
    assert before.keys() == after.keys() and len(after) > 500
    assert all(torch.equal(before[name], after[name]) for name in after)


# ---- maps


def test_other_layers_are_read_with_the_same_network(make: Callable, tmp_path: Path):
    images, layers = make_images(1), [LAYER, 'unet-out']
    backbone = make(cache=str(tmp_path))
    before = backbone(images)
    other = backbone.reading(layers, [261])
    expected = make(layers=layers, timesteps=[261], channels=None)
    assert other.layers == layers and other.channels == expected.channels
    assert other.fingerprint == expected.fingerprint
    for maps in zip(other(images), expected(images), strict=True):
        torch.testing.assert_close(*maps, rtol=2**-11, atol=1e-4)  # one is in the cache, in float16
    assert other.extractor.network is backbone.extractor.network
    assert all(torch.equal(*maps) for maps in zip(backbone(images), before, strict=True))
    with pytest.raises(ValueError, match='no-such-layer'):
        backbone.reading(['no-such-layer'], [50])
    with pytest.raises(ValueError, match='only a frozen network is shared'):
        make(lora={'r': 2}).reading([LAYER], [50])


def test_maps_are_timestep_major_in_the_order_of_layers(make: Callable, tiny_pipeline: Path):
    images = make_images()
    with torch.no_grad():
        expected = DiffusionExtractor(str(tiny_pipeline), LAYERS, TIMESTEPS)(images)  # {name: (B, T, C, h, w)}
    maps = make()(images)
    channels, sizes = [c for level in CHANNELS for c in level], [(8, 12), (4, 6), (2, 3), (2, 3)]
    for x, name, c, size in zip(maps, LAYERS, channels, sizes, strict=True):
        assert x.shape == (2, len(TIMESTEPS) * c, *size)
        for i in range(len(TIMESTEPS)):
            assert torch.equal(x[:, i * c : (i + 1) * c], expected[name][:, i])


def test_maps_have_the_dtype_of_the_image_and_no_graph(make: Callable):
    for x in make(dtype='bfloat16')(make_images()):
        assert x.dtype == torch.float32 and not x.requires_grad


@pytest.mark.parametrize(('input_size', 'resized'), [(128, (128, 128)), ([64, 128], (64, 128))])
def test_input_size_resizes_bilinearly(make: Callable, input_size: int | list[int], resized: tuple[int, int]):
    images = make_images()
    ours = make(input_size=input_size)(images)
    expected = make()(F.interpolate(images, resized, mode='bilinear'))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert ours[0].shape[-2:] == (resized[0] // 8, resized[1] // 8)


def test_sizes_that_are_no_multiple_of_the_stride(make: Callable):
    assert [tuple(x.shape[-2:]) for x in make()(make_images()[..., :61, :75])] == [(8, 10), (4, 5), (2, 3), (2, 3)]


def test_same_bits_twice_and_same_values_in_any_batch(make: Callable):
    backbone, images = make(), make_images(3)
    together, again, alone = backbone(images), backbone(images), backbone(images[2:])
    for a, b, c in zip(together, again, alone, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a[2:], c, rtol=1e-5, atol=1e-5)


def test_training_noise_may_be_fresh(make: Callable):
    backbone, images = make(train_noise='random').eval(), make_images()
    seeded = backbone(images)[0]
    assert not torch.equal(backbone.train()(images)[0], seeded)
    assert torch.equal(backbone.eval()(images)[0], seeded)


# ---- timesteps of a layer's own


OWN = [f'{LAYERS[0]}@261', LAYERS[1], f'{LAYERS[2]}@500+50', f'{LAYERS[0]}@50']


def test_layers_may_have_timesteps_of_their_own(make: Callable):
    backbone, images = make(layers=OWN, channels=[32, 32, 64, 32]), make_images()
    assert backbone.layers == OWN and backbone.channels == [32, 32, 64, 32]
    every = [x.unflatten(1, (len(TIMESTEPS), -1)) for x in make(layers=LAYERS[:3])(images)]  # (B, T, C, h, w)
    expected = [every[0][:, [1]], every[1], every[2][:, [2, 0]], every[0][:, [0]]]
    for x, theirs in zip(backbone(images), expected, strict=True):
        assert torch.equal(x, theirs.flatten(1, 2))


def test_the_network_runs_once_for_all_timesteps(make: Callable):
    backbone, calls = make(layers=[OWN[0], OWN[2]], timesteps=None), []
    backbone.extractor.network.register_forward_pre_hook(lambda module, args: calls.append(args[1].tolist()))
    backbone(make_images(1))
    assert calls == [TIMESTEPS]


def test_aliases_and_attention_beside_timesteps_of_their_own(make: Callable):
    backbone = make(layers=['dift-1@50', 'dift-1@261', 'mid-vit-out'], attention_maps=['up_cross'])
    upsampled = 'up-level1-upsampler-out'
    assert backbone.layers == [f'{upsampled}@50', f'{upsampled}@261', 'mid-vit-out', 'attn']
    assert [x.shape[1] for x in backbone(make_images(1))] == [64, 64, 3 * 64, 3 * backbone.channels[3]]
    assert len(set(backbone.channels[:3])) == 1


def test_timesteps_of_their_own_belong_to_fingerprint_and_cache(make: Callable, tmp_path: Path):
    cache = {'path': str(tmp_path), 'dtype': 'float32'}
    one, other = (make(layers=layers, cache=cache) for layers in (OWN, [*OWN[:3], f'{LAYERS[0]}@500']))
    one.load_state_dict(one.state_dict(), strict=True)
    with pytest.raises(ValueError, match='belongs to another backbone: layers was'):
        other.load_state_dict(one.state_dict())
    for backbone in (one, other, one):
        maps = backbone(make_images(1))
        expected = backbone._extract(make_images(1))
        assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))


def test_the_same_timesteps_said_in_another_way(make: Callable):
    own = make(layers=[f'{layer}@50+261+500' for layer in LAYERS], timesteps=None)
    own.load_state_dict(make().state_dict(), strict=True)


def test_necks_take_another_number_of_timesteps_for_each_map(make: Callable):
    maps = make(layers=OWN)(make_images())
    config = {'levels': [[32, 32, 64, 32]], 'timesteps': [[1, 3, 2, 1]]}
    names = {'layer_names': [OWN], 'timestep_names': ['first', 'second', 'third']}
    neck = MODELS.build({'type': 'AggregationNeck', 'out_channels': 32, 'num_groups': 4, **config, **names})
    assert neck(maps)[0].shape == (2, 32, 8, 12)
    (table,) = neck.mixing_weights()
    assert table.layers == tuple(OWN) and ((table.weights > 0).sum(0) == torch.tensor([1, 3, 2, 1])).all()
    assert MODELS.build({'type': 'ConcatNeck', **config})(maps)[0].shape == (2, 32 + 3 * 32 + 2 * 64 + 32, 8, 12)


def test_timesteps_of_their_own_that_are_wrong(make: Callable):
    with pytest.raises(ValueError, match=r'\[51\] that are not in timesteps=\[50, 261, 500\]'):
        make(layers=[f'{LAYERS[0]}@51'])
    with pytest.raises(ValueError, match='named twice'):
        make(layers=['dift-1@50', 'up-level1-upsampler-out@261'])
    with pytest.raises(ValueError, match=rf'{LAYERS[0]}@50 has 32, not 64'):
        make(layers=OWN, channels=[32, 32, 64, 64])


# ---- channels and errors


@pytest.mark.parametrize('cached', [False, True])
def test_each_image_may_have_its_own_prompt(make: Callable, tmp_path: Path, cached: bool):
    images = make_images()
    backbone = make(cache={'path': str(tmp_path), 'dtype': 'float32'} if cached else None)
    maps = backbone(images, ['a horse', 'a dog'])
    for i, prompt in enumerate(('a horse', 'a dog')):
        alone = make(prompt=prompt)(images[i : i + 1])
        for ours, theirs in zip(maps, alone, strict=True):
            torch.testing.assert_close(ours[i], theirs[0], rtol=1e-4, atol=1e-4)
    other = backbone(images, ['a dog', 'a horse'])
    assert not torch.allclose(maps[0], other[0], rtol=1e-3, atol=1e-3)
    for ours, again in zip(maps, backbone(images, ['a horse', 'a dog']), strict=True):
        assert torch.equal(ours, again)


def test_channels_are_verified(make: Callable):
    assert make(channels=[32, 32, 64, 64]).channels == [32, 32, 64, 64]
    with pytest.raises(ValueError, match=rf'{LAYERS[1]} has 32, not 640.*right list is \[32, 32, 64, 64\]'):
        make(channels=[32, 640, 64, 64])
    with pytest.raises(ValueError, match='3 entries for 4 layers'):
        make(channels=[32, 32, 64])


def test_unknown_layer_names_the_nearest(make: Callable):
    with pytest.raises((KeyError, ValueError), match=LAYER):
        make(layers=[LAYER.replace('cross-q', 'cros-q')])


def test_timestep_outside_the_schedule(make: Callable):
    with pytest.raises(ValueError, match='1000'):
        make(timesteps=[1000])


def test_missing_folder(make: Callable, tmp_path: Path):
    with pytest.raises((ValueError, OSError), match='absent'):
        make(model=str(tmp_path / 'absent'))


def test_truncated_weights(make: Callable, tiny_pipeline: Path, tmp_path: Path):
    shutil.copytree(tiny_pipeline, tmp_path / 'model')
    weights = tmp_path / 'model' / 'unet' / 'diffusion_pytorch_model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises((ValueError, OSError), match='unet'):
        make(model=str(tmp_path / 'model'))


def test_nan_names_the_layer_and_the_dtype(make: Callable):
    backbone = make()
    backbone.extractor.network.up_blocks[3].attentions[0].transformer_blocks[0].attn1.to_k.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r'(?s)up-level3-repeat0-vit-block0-self-k.*float32'):
        backbone(make_images())


def test_image_smaller_than_a_latent_cell(make: Callable):
    with pytest.raises(ValueError, match='8'):
        make()(make_images()[..., :7, :])


# ---- checkpoints


def test_state_dict_is_the_fingerprint_and_loads_strictly(make: Callable):
    source, target = make(), make()
    state = source.state_dict()
    assert list(state) == ['_extra_state'] and state['_extra_state'].dtype == torch.uint8
    target.load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match='_extra_state'):
        target.load_state_dict({}, strict=True)


def test_mmengine_saves_and_loads_it(make: Callable, tmp_path: Path):
    save_checkpoint({'state_dict': make().state_dict()}, str(tmp_path / 'a.pth'))
    load_checkpoint(make(), str(tmp_path / 'a.pth'), strict=True)
    with pytest.raises(ValueError, match=r'timesteps was \[50, 261, 500\] and is \[50, 261, 501\]'):
        load_checkpoint(make(timesteps=[50, 261, 501]), str(tmp_path / 'a.pth'), strict=False)


@pytest.mark.parametrize('options', [{'layers': LAYERS[:3]}, {'dtype': 'bfloat16'}, {'prompt': 'a photo of a horse'}])
def test_another_fingerprint_is_refused(make: Callable, options: dict):
    with pytest.raises(ValueError, match=r'belongs to another backbone: .* was .* and is '):
        make(**options).load_state_dict(make().state_dict())


def test_another_fingerprint_is_a_warning_if_the_config_says_so(make: Callable, monkeypatch):
    messages = []
    monkeypatch.setattr('diffseg.models.backbones.frozen.print_log', lambda message, *_: messages.append(message))
    state = make(dtype='bfloat16').state_dict()
    backbone = make(check_fingerprint='warn')
    backbone.load_state_dict(state)
    (message,) = messages
    assert "dtype was 'bfloat16' and is 'float32'" in message and 'loaded nevertheless' in message
    backbone.load_state_dict(make().state_dict())
    assert len(messages) == 1
    with pytest.raises(ValueError, match="check_fingerprint is 'ignore'; it is 'error' or 'warn'"):
        make(check_fingerprint='ignore')


def test_another_folder_with_the_same_weights_is_the_same_model(make: Callable, tiny_pipeline: Path, tmp_path: Path):
    shutil.copytree(tiny_pipeline, tmp_path / 'copy')
    moved = make(model=str(tmp_path / 'copy'))
    moved.load_state_dict(make().state_dict(), strict=True)
    weights = tmp_path / 'copy' / 'unet' / 'diffusion_pytorch_model.safetensors'
    save_file({key: value * 1.01 for key, value in load_file(weights).items()}, weights, {'format': 'pt'})
    with pytest.raises(ValueError, match='weights was'):
        make(model=str(tmp_path / 'copy')).load_state_dict(make().state_dict())


def test_another_text_encoder_is_another_model(make: Callable, tiny_pipeline: Path, tmp_path: Path):
    other = str(tiny.change_text_encoder(Path(shutil.copytree(tiny_pipeline, tmp_path / 'other'))))
    with pytest.raises(ValueError, match='another backbone: text_encoder was'):
        make(model=other).load_state_dict(make().state_dict())
    given = torch.zeros(1, 5, 32)  # so that no text is encoded
    make(model=other, prompt=given).load_state_dict(make(prompt=given).state_dict())


def test_other_draws_of_noise_are_accepted(make: Callable):
    make(noise='random', seed=3).load_state_dict(make().state_dict(), strict=True)


# ---- what mmengine does to a model


def test_train_keeps_the_network_in_evaluation_mode(make: Callable):
    backbone = nn.Sequential(make()).train()[0]
    assert backbone.training and not any(module.training for module in backbone.extractor.modules())
    backbone.extractor.network.conv_in.train()
    assert not any(module.training for module in backbone.train().extractor.modules())


def test_the_mode_of_the_network_is_not_set_in_every_iteration(make: Callable, monkeypatch: pytest.MonkeyPatch):
    backbone = make()
    monkeypatch.setattr(nn.Conv2d, 'train', lambda *_: pytest.fail('the mode of the network was set again'))
    for mode in (True, False, True):
        assert nn.Sequential(backbone).train(mode)[0].training is mode


def test_init_weights_touches_nothing(make: Callable):
    backbone = make()
    backbone.extractor.network.init_weights = lambda: pytest.fail('mmengine initialised a loaded network')
    before = frozen_tensors(backbone)
    backbone.init_weights()
    assert_untouched(backbone, before)


def test_sync_batchnorm_conversion_touches_nothing(make: Callable):
    backbone = make()
    before, modules = frozen_tensors(backbone), list(backbone.modules())
    model = revert_sync_batchnorm(convert_sync_batchnorm(nn.Sequential(backbone)))
    assert all(a is b for a, b in zip(model[0].modules(), modules, strict=True))
    assert_untouched(model[0], before)


def test_a_copy_shares_the_frozen_tensors(make: Callable):
    backbone = make(frozen=False, trainable=TRAINABLE)
    clone = copy.deepcopy(backbone)
    frozen = dict(backbone.extractor.named_buffers())
    assert all(tensor.data_ptr() == frozen[name].data_ptr() for name, tensor in clone.extractor.named_buffers())
    trained = dict(backbone.named_parameters())
    assert all(tensor.data_ptr() != trained[name].data_ptr() for name, tensor in clone.named_parameters())
    images = make_images()
    assert all(torch.equal(a, b) for a, b in zip(clone(images), backbone(images), strict=True))
    clone.to(torch.float64)
    assert backbone.extractor.network.dtype == torch.float32


@pytest.mark.parametrize('update_buffers', [False, True])
def test_moving_average_changes_no_frozen_tensor(make: Callable, update_buffers: bool):
    backbone = make(frozen=False, trainable=TRAINABLE)
    before = frozen_tensors(backbone)
    average = ExponentialMovingAverage(backbone, momentum=0.5, update_buffers=update_buffers)
    average.update_parameters(backbone)
    start = [parameter.clone() for parameter in average.module.parameters()]
    for parameter in backbone.parameters():
        parameter.data += 1
    average.update_parameters(backbone)
    assert_untouched(backbone, before)
    assert_untouched(average.module, before)
    for averaged, begun in zip(average.module.parameters(), start, strict=True):
        torch.testing.assert_close(averaged, begun + 0.5)


# ---- training parts of the UNet


def test_chosen_parts_train_and_the_rest_does_not(make: Callable):
    backbone = make(frozen=False, trainable=TRAINABLE).train()
    names = [name for name, _ in backbone.named_parameters()]
    assert {name.split('.')[2] for name in names} == {'up_blocks', 'time_embedding'}
    frozen, trained = frozen_tensors(backbone), {n: p.detach().clone() for n, p in backbone.named_parameters()}
    sum(x.square().mean() for x in backbone(make_images())).backward()
    torch.optim.SGD(backbone.parameters(), lr=1.0).step()
    assert [name for name, parameter in backbone.named_parameters() if torch.equal(parameter, trained[name])] == []
    assert_untouched(backbone, frozen)


def test_all_that_the_maps_depend_on_trains_by_default(make: Callable):
    backbone = make(frozen=False, layers=[LAYER])
    names = [name.removeprefix('extractor.network.') for name, _ in backbone.named_parameters()]
    assert 'conv_in.weight' in names and 'up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q.weight' in names
    assert not any(name.startswith(('conv_out', 'up_blocks.2', 'up_blocks.1.resnets.2')) for name in names)
    assert 'up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k.weight' not in names
    backbone(make_images())[0].square().mean().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_gradient_checkpointing_gives_the_same_gradients(make: Callable):
    gradients = []
    for checkpointing in (False, True):
        backbone = make(frozen=False, trainable=TRAINABLE, gradient_checkpointing=checkpointing).train()
        sum(x.square().mean() for x in backbone(make_images())).backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_norms_that_are_trained_keep_the_memory_format_of_a_device(make: Callable):
    """On the CPU it is changed, since the kernel there crashes on some of them."""
    backbone = make(frozen=False, trainable=TRAINABLE, memory_format='channels_last')
    (hook,) = next(m for m in backbone.modules() if isinstance(m, nn.GroupNorm))._forward_pre_hooks.values()
    x = torch.randn(1, 4, 2, 3).to(memory_format=torch.channels_last)
    with fake_device() as to_device:
        (kept,) = hook(None, (to_device(x),))
        assert kept.is_contiguous(memory_format=torch.channels_last)
    (changed,) = hook(None, (x,))
    assert changed.is_contiguous() and torch.equal(changed, x)


def test_trained_parts_are_in_the_checkpoint(make: Callable):
    source, target = (make(frozen=False, trainable=TRAINABLE) for _ in range(2))
    for parameter in source.parameters():
        parameter.data += 0.1
    state = source.state_dict()
    assert set(state) == {'_extra_state', *(name for name, _ in source.named_parameters())}
    target.load_state_dict(state, strict=True)
    images = make_images()
    assert all(torch.equal(a, b) for a, b in zip(source(images), target(images), strict=True))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'trainable': ['*']}, 'set frozen=False'),
        ({'frozen': False, 'trainable': ['up_block.*']}, r"\['up_block.\*'\] select no parameter"),
        ({'frozen': False, 'trainable': ['conv_out.*']}, 'chosen layers depend on'),
        ({'frozen': False, 'dtype': 'bfloat16'}, "needs dtype='float32'"),
        ({'train_noise': 'fresh'}, "'fresh'; it is 'seeded' or 'random'"),
    ],
)
def test_options_that_cannot_be(make: Callable, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make(**options)


# ---- pixel space


@pytest.fixture
def make_pixels(tiny_pixel_pipeline: Path) -> Callable[..., DiffusionBackbone]:
    """Build a backbone on a model of pixel space."""

    def build(**options) -> DiffusionBackbone:
        return MODELS.build(backbone_config(tiny_pixel_pipeline, **{'layers': ['adm-4', 'adm-1'], **options}))

    return build


def test_maps_of_pixel_space_and_their_cache(make_pixels: Callable, tmp_path: Path):
    x = make_images()[..., :30, :50]
    backbone = make_pixels(cache=str(tmp_path), channels=[16, 32])
    maps, again = backbone(x), backbone(x)
    assert [tuple(m.shape) for m in maps] == [(2, 3 * 16, 15, 25), (2, 3 * 32, 8, 13)]
    assert all(torch.equal(a, b) for a, b in zip(maps, again, strict=True))
    assert backbone.cache.counts.hits == 2
    backbone.load_state_dict(make_pixels().state_dict(), strict=True)
    with pytest.raises(ValueError, match='another backbone: layers was'):
        backbone.load_state_dict(make_pixels(layers=['adm-4', 'adm-0']).state_dict())


@pytest.mark.parametrize('pattern', ['*', 'up_blocks.1.*', 'up_blocks.0.upsamplers.0.norm1.*'])
def test_parts_of_a_network_of_pixels_train(make_pixels: Callable, pattern: str):
    backbone = make_pixels(frozen=False, trainable=[pattern])
    sum(m.square().mean() for m in backbone(make_images())).backward()
    trained = {name for name, p in backbone.extractor.network.named_parameters() if p.grad.abs().sum() > 0}
    assert trained and all(fnmatchcase(name, pattern) for name in trained)
    assert not any(name.startswith('up_blocks.2') for name in trained)  # behind the layers


def test_lora_beside_a_network_of_pixels_trains(make_pixels: Callable):
    backbone = make_pixels(lora={'r': 2})
    sum(m.square().mean() for m in backbone(make_images())).backward()
    trained = {name: p.grad for name, p in backbone.extractor.network.named_parameters() if p.requires_grad}
    assert trained and all('lora_' in name for name in trained)
    assert any(grad.abs().sum() > 0 for grad in trained.values())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'prompt': 'a horse'}, "leave out 'a horse'"),
        ({'conditioner': {'type': 'LearnedPrompts', 'num_prompts': 3, 'dim': 32}}, 'leave out the conditioner'),
    ],
)
def test_what_models_of_pixel_space_do_not_take(make_pixels: Callable, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_pixels(**options)

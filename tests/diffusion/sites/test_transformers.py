"""Sites of diffusion transformers: the published codes' values, and every site of every class by hand."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_transformers
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_transformers import KINDS, inputs, transformer
from torch import Tensor, nn
from transformers_by_hand import by_hand

from diffseg.diffusion.loading import load_parts
from diffseg.diffusion.recorder import ActivationRecorder
from diffseg.diffusion.sites import sites

OURS = ('in', 'mod', 'map')  # the last part of names that GDF has not
FLUX_OUT = ['vit-block0-out', 'vit-block1-out']  # where the published code gathers another activation
ALL_KINDS = pytest.mark.parametrize('kind', KINDS)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


def tokens_of(activation: Tensor) -> Tensor:
    return activation.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h*w, C)


def hooks(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def published(folder: Path, network: type, **grid) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    """Names in order of execution, their values, and what we read."""
    module = network.from_pretrained(folder / 'transformer')
    given = load_file(folder / 'inputs.safetensors')
    theirs = load_file(folder / 'activations.safetensors')
    with safe_open(folder / 'activations.safetensors', 'pt') as file:
        order = json.loads(file.metadata()['order'])
    names = [name for name in sites(module) if not name.endswith(OURS)]
    assert names == [*order, 'transformer-out']  # all of them, in order of execution
    given = {'x_t': given.pop('hidden_states'), **given, **grid}
    return order, theirs, ActivationRecorder(module, names)(**given)


@torch.no_grad()
def test_pixart_agrees_with_the_published_code(reference):
    order, theirs, ours = published(reference('pixart'), PixArtTransformer2DModel)
    assert len(order) == 18
    errors = {name: relative_error(ours[name], theirs[name]) for name in order}
    assert max(errors.values()) < 1e-5, errors
    assert relative_error(ours['transformer-out'], theirs['transformer-sample']) < 1e-5


@torch.no_grad()
def test_flux_agrees_with_the_published_code(reference):
    order, theirs, ours = published(reference('flux'), FluxTransformer2DModel, grid=(8, 8))
    assert len(order) == 29
    errors = {name: relative_error(ours[name], theirs[name]) for name in order if name not in FLUX_OUT}
    assert max(errors.values()) < 1e-5, errors
    assert relative_error(tokens_of(ours['transformer-out']), theirs['transformer-sample']) < 1e-5


@torch.no_grad()
def test_output_of_flux_double_blocks_is_the_modulated_norm_in_the_published_code(reference):
    _, theirs, ours = published(reference('flux'), FluxTransformer2DModel, grid=(8, 8))
    for name in FLUX_OUT:
        assert relative_error(ours[name.replace('-out', '-norm-out')], theirs[name]) < 1e-5
        assert relative_error(ours[name], theirs[name]) > 0.1


@pytest.fixture
def ditf(reference, monkeypatch, pipeline_folder, tmp_path) -> tuple[nn.Module, dict, dict[str, Tensor]]:
    """The network from Black Forest Labs' single file, its arguments, and the published values."""
    folder = reference('ditf')
    config = json.loads((folder / 'config.json').read_text())
    split = torch.split

    def split_in_proportion(tensor: Tensor, sizes: tuple[int, ...], dim: int = 0) -> tuple[Tensor, ...]:
        return split(tensor, [size * tensor.shape[dim] // sum(sizes) for size in sizes], dim)

    model = Path(shutil.copytree(pipeline_folder('flux'), tmp_path / 'flux'))
    described = {
        '_class_name': 'FluxTransformer2DModel',
        'in_channels': config['in_channels'],
        'num_layers': config['depth'],
        'num_single_layers': config['depth_single_blocks'],
        'attention_head_dim': config['hidden_size'] // config['num_heads'],
        'num_attention_heads': config['num_heads'],
        'joint_attention_dim': config['context_in_dim'],
        'pooled_projection_dim': config['vec_in_dim'],
        'guidance_embeds': config['guidance_embed'],
        'axes_dims_rope': config['axes_dim'],
    }
    (model / 'transformer' / 'config.json').write_text(json.dumps(described))
    with monkeypatch.context() as patch:  # diffusers' conversion knows the width of the released models alone
        patch.setattr(torch, 'split', split_in_proportion)
        network = load_parts(model, network_weights=folder / 'model.safetensors', vae=False).network
    values = load_file(folder / 'inputs.safetensors')
    given = {
        'x_t': values['img'],
        'timestep': values['timesteps'],
        'encoder_hidden_states': values['txt'],
        'pooled_projections': values['y'],
        'img_ids': values['img_ids'][0],
        'txt_ids': values['txt_ids'][0],
        'guidance': values['guidance'],
        'grid': (8, 8),
    }
    return network, given, load_file(folder / 'activations.safetensors')


@torch.no_grad()
def test_ditf_agrees_with_the_published_code(ditf):
    network, given, theirs = ditf
    blocks = range(19, 23)
    modulated = [f'vit-block{i}-mod' for i in blocks]
    plain = ActivationRecorder(network, [*modulated, *(f'vit-block{i}-in' for i in blocks), 'transformer-out'])(**given)
    discarded = ActivationRecorder(network, modulated, discard=(3, 17))(**given)
    assert relative_error(tokens_of(plain['transformer-out']), theirs['sample']) < 1e-5
    for i in blocks:
        name = f'vit-block{i}-mod'
        assert relative_error(tokens_of(plain[f'vit-block{i}-in']), theirs[f'block-{i}-raw']) < 1e-5
        assert relative_error(tokens_of(plain[name]), theirs[f'block-{i}-adaln']) < 1e-5
        assert relative_error(tokens_of(discarded[name]), theirs[f'block-{i}-adaln-discard-3-17']) < 1e-5
        assert relative_error(plain[name], discarded[name]) > 0.01


@ALL_KINDS
@torch.no_grad()
def test_every_site_equals_its_computation_by_hand(kind):
    network, given = transformer(kind), inputs(kind)
    names = [name for name in sites(network) if name != 'transformer-out']
    read = ActivationRecorder(network, names)(**given)
    expected = by_hand(kind, network, given)
    assert set(names) == set(expected)
    for name in names:
        ours = read[name] if expected[name].ndim == 4 else tokens_of(read[name])
        assert relative_error(ours, expected[name]) < 1e-5, name


@ALL_KINDS
@torch.no_grad()
def test_every_site_is_as_described(kind):
    network = transformer(kind)
    available = sites(network)
    read = ActivationRecorder(network, list(available))(**inputs(kind, 2, 8, 12))
    factor = 32 if kind == 'sana' else 8
    grid = (8, 12) if kind == 'sana' else (4, 6)
    for name, site in available.items():
        cells = (8, 12) if site.kind == 'patches' else grid
        assert site.size(8 * factor, 12 * factor) == cells
        assert read[name].shape[2:] == cells
        assert site.channels in (None, read[name].shape[1])
        assert (site.channels is None) == name.endswith('-map')


@ALL_KINDS
def test_described_on_the_meta_device(kind):
    with torch.device('meta'):
        described = sites(KINDS[kind][0](**KINDS[kind][1]), vae_scale_factor=4)
    network = transformer(kind)
    assert described == sites(network, vae_scale_factor=4)
    finest = next(site for site in described.values() if site.name == 'vit-block0-out').stride
    assert finest == (4 if kind == 'sana' else 8)


def test_blocks_of_flux_are_counted_as_in_ditf():
    """Block 28 of FLUX.1-dev, counted over all blocks, is the tenth single one; a token is 16 pixels wide."""
    with torch.device('meta'):
        site = sites(FluxTransformer2DModel(guidance_embeds=True))['vit-block28-mod']
    assert (site.path, site.channels, site.stride) == ('single_transformer_blocks.9.attn.to_q', 3072, 16)


@ALL_KINDS
@torch.no_grad()
def test_prediction_is_the_networks_output(kind):
    network, given = transformer(kind), inputs(kind, 2, 8, 8 if kind in tiny_transformers.SQUARE else 12)
    outputs = []
    network.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    prediction = ActivationRecorder(network, ['transformer-out'], stop_early=False)(**given)['transformer-out']
    (theirs,) = outputs
    if isinstance(theirs, list):
        theirs = torch.stack(theirs).squeeze(2)  # (B, C, 1, h, w)
    assert torch.equal(tokens_of(prediction) if theirs.ndim == 3 else prediction, theirs)


@torch.no_grad()
def test_prediction_of_dit_is_not_cut_into_a_square():
    """A latent of one row more has one row of patches more; diffusers' output has as many as fit a square."""
    network, given = transformer('dit'), inputs('dit', 1, 8, 12)
    tokens = []
    network.proj_out_2.register_forward_hook(lambda module, args, output: tokens.append(output))
    prediction = ActivationRecorder(network, ['transformer-out'])(**given)['transformer-out']
    assert prediction.shape == (1, 8, 8, 12)
    patch = tokens[0][0, 2 * 6 + 5].unflatten(0, (2, 2, 8))  # in row 2, column 5
    assert torch.equal(prediction[0, :, 4:6, 10:12], patch.permute(2, 0, 1))


@ALL_KINDS
@torch.no_grad()
def test_stops_early_with_the_same_values(kind):
    network, given = transformer(kind), inputs(kind)
    names = list(sites(network))
    last = max(i for i, name in enumerate(names) if name.startswith('vit-block0-'))
    wanted = names[: last + 1]
    path = sites(network)['vit-block1-out'].path
    executed = []
    network.get_submodule(path).register_forward_pre_hook(lambda *_: executed.append(path))
    early = ActivationRecorder(network, wanted)(**given)
    assert executed == []
    full = ActivationRecorder(network, wanted, stop_early=False)(**given)
    assert executed == [path]
    alone = ActivationRecorder(network, wanted[-1:])(**given)
    for name in wanted:
        assert torch.equal(early[name], full[name]), name
    assert torch.equal(alone[wanted[-1]], full[wanted[-1]])


@ALL_KINDS
@torch.no_grad()
def test_sites_are_listed_in_order_of_execution(kind):
    network = transformer(kind)
    executed: list[str] = []
    for name, site in sites(network).items():
        path, before = site.path, site.is_input
        if site.probe is not None:
            path, before = site.probe.output or path, bool(site.probe.output)
        module = network.get_submodule(path)
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        register(lambda *_, name=name: executed.append(name))
    recorder = ActivationRecorder(network, ['transformer-out'])
    recorder(**inputs(kind))
    assert executed == list(sites(network))


@ALL_KINDS
@torch.no_grad()
def test_discarded_channels_are_zero_before_the_norm(kind):
    """What is modulated again is what the network itself would compute if these channels of its features were zero."""
    network, given = transformer(kind), inputs(kind)
    modulated = [name for name in sites(network) if name.startswith('vit-block1-') and name.endswith('mod')]
    others = [f'vit-block1-{"q" if "vit-block1-q" in sites(network) else "self-q"}', 'vit-block1-in']
    plain = ActivationRecorder(network, [*modulated, *others])(**given)
    recorder = ActivationRecorder(network, [*modulated, *others], discard=(1, 5))
    discarded = recorder(**given)
    assert hooks(network) == 0

    def without_channels(module: nn.Module, args: tuple) -> tuple:
        kept = torch.ones(args[0].shape[-1])
        kept[[1, 5]] = 0
        return args[0] * kept, *args[1:]

    network.get_submodule(sites(network)['vit-block1-mod'].norm).register_forward_pre_hook(without_channels)
    expected = ActivationRecorder(network, modulated)(**given)
    for name in modulated:
        torch.testing.assert_close(discarded[name], expected[name], atol=1e-6, rtol=1e-5)
        assert relative_error(discarded[name], plain[name]) > 0.01
    for name in others:
        assert torch.equal(discarded[name], plain[name])


@ALL_KINDS
@torch.no_grad()
def test_maps_are_probabilities_over_all_keys(kind):
    """They add up to one with those of the other stream; in Z-Image padding of the image is attended to, too."""
    network, given = transformer(kind), inputs(kind)
    maps = [name for name in sites(network) if name.endswith('-map')]
    read = ActivationRecorder(network, maps)(**given)
    joint = 'vit-block1-q' in sites(network)
    for name in maps:
        total = read[name].sum(1)
        if joint and 'attn2' not in name and not name.startswith('refiner'):
            other = name.replace('cross', 'self') if 'cross' in name else name.replace('self', 'cross')
            total = total + read[other].sum(1)
        if kind == 'z-image':
            assert (total < 1).all() and (total > 0.1).all()
        else:
            torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize('kind', ['flux', 'lumina2', 'pixart'])
@torch.no_grad()
def test_hooks_are_gone_after_every_end(kind):
    network, given = transformer(kind), inputs(kind)
    names = ['vit-block0-mod', 'vit-block0-cross-map', 'vit-block1-out']
    recorder = ActivationRecorder(network, names, discard=[2])
    recorder(**given)
    assert hooks(network) == 0
    with pytest.raises(RuntimeError):
        recorder(**{**given, 'encoder_hidden_states': torch.zeros(2, 5, 7)})
    assert hooks(network) == 0


@pytest.mark.parametrize('name', ['vit-block0-mod', 'vit-block0-cross-map'])
@torch.no_grad()
def test_hooks_are_gone_after_an_error_in_the_second_call_of_a_block(name):
    network, given = transformer('flux'), inputs('flux')
    site = sites(network)[name]
    calls = []

    def fail_again(module: nn.Module, args: tuple) -> None:
        calls.append(module)
        if len(calls) == 2:
            raise KeyError('again')

    handle = network.get_submodule(site.norm or site.path).register_forward_pre_hook(fail_again)
    recorder = ActivationRecorder(network, [name], stop_early=False, discard=[2] if site.norm else ())
    with pytest.raises(KeyError, match='again'):
        recorder(**given)
    handle.remove()
    assert hooks(network) == 0


@pytest.mark.parametrize('kind', ['flux', 'sd35-medium', 'z-image', 'sana'])
def test_gradients_with_and_without_checkpointing(kind):
    network, given = transformer(kind).train(), inputs(kind)
    names = [name for name in sites(network) if name.startswith('vit-block') and not name.endswith('self-map')]
    executed = []
    network.get_submodule(sites(network)['transformer-out'].path).register_forward_hook(lambda *_: executed.append(1))

    def gradients(**options) -> dict[str, Tensor]:
        network.zero_grad()
        read = ActivationRecorder(network, names, discard=[3], **options)(**given)
        sum(value.square().mean() for value in read.values()).backward()
        return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    expected = gradients()
    assert executed == []
    network.enable_gradient_checkpointing()
    ours = gradients()
    assert executed == [1]  # checkpointed modules must not be left by an exception
    assert set(ours) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient)


@pytest.mark.parametrize('kind', ['flux', 'lumina2', 'hunyuan-dit'])
@torch.no_grad()
def test_half_precision(kind):
    network, given = transformer(kind), inputs(kind)
    names = [name for name in sites(network) if '-block1-' in name]
    expected = ActivationRecorder(network, names, discard=[3])(**given)
    network.to(torch.bfloat16)
    given = {
        key: value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in given.items()
    }
    read = ActivationRecorder(network, names, discard=[3])(**given)
    for name, value in read.items():
        assert relative_error(value.float(), expected[name]) < 0.1, name


@pytest.mark.parametrize('name', ['vit-block1-mod', 'vit-block1-cross-map', 'vit-block2-self-map'])
@torch.no_grad()
def test_fused_projections_hide_modules(name):
    network, given = transformer('flux'), inputs('flux')
    network.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match=r'did not execute .*attn\.to_[qv]; .* fused projections'):
        ActivationRecorder(network, [name])(**given)
    assert hooks(network) == 0


def test_grids_that_cannot_be():
    network, given = transformer('flux'), inputs('flux')
    recorder = ActivationRecorder(network, ['vit-block0-q'])
    with pytest.raises(ValueError, match='grid is missing: a FluxTransformer2DModel takes packed latents'):
        recorder(**{**given, 'grid': None})
    with pytest.raises(ValueError, match=r'grid is \(4, 5\), but there are 24 tokens'):
        recorder(**{**given, 'grid': (4, 5)})
    recorder = ActivationRecorder(transformer('sd3'), ['vit-block0-q'])
    with pytest.raises(ValueError, match=r'7 x 12 cells; .* multiples of 2: pad it to 8 x 12'):
        recorder(**inputs('sd3', 2, 7, 12))
    with pytest.raises(ValueError, match=r'grid is \(6, 4\); a latent of 8 x 12 cells has \(4, 6\)'):
        recorder(**inputs('sd3'), grid=(6, 4))


def test_a_mask_that_is_missing():
    recorder = ActivationRecorder(transformer('lumina2'), ['vit-block0-q'])
    with pytest.raises(ValueError, match='encoder_attention_mask is missing'):
        recorder(**{**inputs('lumina2'), 'encoder_attention_mask': None})


@torch.no_grad()
def test_the_grid_of_packed_latents_decides_how_tokens_fold():
    network, given = transformer('flux'), inputs('flux')
    wide = ActivationRecorder(network, ['vit-block1-q'])(**given)['vit-block1-q']
    high = ActivationRecorder(network, ['vit-block1-q'])(**{**given, 'grid': (6, 4)})['vit-block1-q']
    assert wide.shape[2:] == (4, 6) and high.shape[2:] == (6, 4)
    assert torch.equal(wide.flatten(2), high.flatten(2))


def test_discard_that_cannot_be(tiny_unet):
    network = transformer('flux')
    with pytest.raises(ValueError, match=r'discard is \(3,\), but no modulated features are read'):
        ActivationRecorder(network, ['vit-block0-in'], discard=[3])
    with pytest.raises(ValueError, match=r"discard holds \[-1, 32\]; 'vit-block0-mod' has the channels 0 to 31"):
        ActivationRecorder(network, ['vit-block0-mod'], discard=[3, -1, 32])
    with pytest.raises(ValueError, match='no modulated features'):
        ActivationRecorder(tiny_unet(), ['unet-out'], discard=[3])


def test_names_that_transformers_have_not():
    network = transformer('sd3')
    with pytest.raises(ValueError, match="unknown activation 'dift-1'"):
        ActivationRecorder(network, ['dift-1'])
    with pytest.raises(ValueError, match=r"unknown activation 'vit-block2-self-q'; the nearest of .* vit-block2-q"):
        ActivationRecorder(network, ['vit-block2-self-q'])
    with pytest.raises(ValueError, match='levels of a UNet, which this network does not have'):
        ActivationRecorder(network, [], attention=['up_cross'])

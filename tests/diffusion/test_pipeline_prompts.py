import gc
import json
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from torch import Tensor
from transformers.utils.import_utils import BACKENDS_MAPPING

from diffseg.diffusion import pipeline_prompts, prompt_store
from diffseg.diffusion.conditioning import NoPromptEncoder, PromptEncoder
from diffseg.diffusion.loading import ModelSource, find_source
from diffseg.diffusion.lora import LoraWeights
from diffseg.diffusion.pipeline_prompts import ENCODINGS, PipelinePromptEncoder, find_pipeline, prompt_encoder

PROMPTS = ['a photo of a horse', '', 'Two dogs, and an elephant']
KINDS = [kind for kind in tiny_pipelines.TEXTS if kind != 'sd35-medium']  # with the texts of sd3
MASKED = ('pixart-alpha', 'pixart-sigma', 'sana', 'hunyuan-dit', 'lumina2')
LENGTHS = {  # of the tokens
    'pixart-alpha': 120,
    'pixart-sigma': 300,
    'sd3': 77 + 256,
    'sana': 300,
    'hunyuan-dit': 77,
    'auraflow': 256,
    'lumina2': 256,
    **dict.fromkeys(('flux', 'flux2', 'flux2-klein'), 512),
}
ARGUMENTS = {  # names of the fields in the networks' forward
    'encoder_hidden_states': 'embeds',
    'cap_feats': 'embeds',
    'pooled_projections': 'pooled',
    'encoder_attention_mask': 'mask',
    'encoder_hidden_states_mask': 'mask',
    'text_embedding_mask': 'mask',
    'encoder_hidden_states_t5': 'embeds_2',
    'text_embedding_mask_t5': 'mask_2',
}


@pytest.fixture
def encoder(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., PipelinePromptEncoder]:
    """`encoder(kind, **options)` has a cache of its test, and text encoders in float32."""
    return lambda kind, **options: PipelinePromptEncoder(
        **{'model': pipeline_folder(kind), 'cache_dir': tmp_path / 'cache', 'dtype': torch.float32, **options}
    )


@pytest.fixture
def forbid_encoders(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, loading a text encoder fails."""

    def fail(*args, **kwargs):
        raise AssertionError('a text encoder was loaded')

    return lambda: monkeypatch.setattr(pipeline_prompts, '_load_encoder', fail)


def texts_of_network(folder: Path, prompt: str, **options) -> list[dict[str, Tensor]]:
    """What a pipeline passes of prompts to its transformer, by field of `Conditioning`, for each call."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    calls = []
    for call in tiny_pipelines.network_calls(pipeline, prompt=prompt, height=64, width=64, **options):
        fields = {ARGUMENTS[name]: x for name, x in call.items() if name in ARGUMENTS and x is not None}
        calls.append({name: x[0].unsqueeze(0) if isinstance(x, list) else x for name, x in fields.items()})
    return calls


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert ours[name].dtype == x.dtype and torch.equal(ours[name], x), name


@pytest.mark.parametrize('kind', KINDS)
def test_networks_get_what_they_get_from_the_pipeline(kind, pipeline_folder, encoder):
    guidance = {} if kind == 'qwen-image' else {'guidance_scale': 0.0}
    theirs = texts_of_network(pipeline_folder(kind), PROMPTS[2], **guidance)[0]
    ours = encoder(kind)([PROMPTS[2]]).by_name
    assert_same(ours, theirs)
    assert 'mask' in ours if kind in MASKED else 'mask' not in ours
    assert ours['embeds'].shape[1] == LENGTHS.get(kind, ours['embeds'].shape[1])


@pytest.mark.parametrize('kind', ['sana', 'lumina2'])
def test_negative_prompts_have_no_instruction(kind, pipeline_folder, encoder):
    calls = texts_of_network(pipeline_folder(kind), PROMPTS[0], negative_prompt=PROMPTS[2], guidance_scale=4.0)
    plain = encoder(kind)
    ours = plain.for_negative_prompts()([PROMPTS[2]]).by_name
    assert_same(ours, calls[1] if kind == 'lumina2' else {name: x[:1] for name, x in calls[0].items()})
    assert not torch.equal(ours['embeds'], plain([PROMPTS[2]]).embeds)
    assert plain.for_negative_prompts().fingerprint != plain.fingerprint


def test_negative_prompts_of_other_families_are_prompts(pipeline_folder, encoder):
    plain = encoder('pixart-sigma')
    assert plain.for_negative_prompts() is plain
    call = texts_of_network(
        pipeline_folder('pixart-sigma'), PROMPTS[0], negative_prompt=PROMPTS[2], guidance_scale=4.0
    )[0]
    assert_same(plain([PROMPTS[2]]).by_name, {name: x[:1] for name, x in call.items()})


@pytest.mark.parametrize('kind', tiny_pipelines.QUICK)
def test_encode_prompt_in_bfloat16(kind, pipeline_folder, tmp_path):
    ours = PipelinePromptEncoder(pipeline_folder(kind), cache_dir=tmp_path)(PROMPTS)
    pipeline = DiffusionPipeline.from_pretrained(
        pipeline_folder(kind), transformer=None, vae=None, dtype=torch.bfloat16
    )
    for i, prompt in enumerate(PROMPTS):
        guidance = {} if kind == 'flux' else {'do_classifier_free_guidance': False}
        lengths = {'max_sequence_length': 77} if kind == 'hunyuan-dit' else {}
        length = {'prompt_2': None, 'max_sequence_length': 512} if kind == 'flux' else lengths
        with torch.no_grad():
            theirs = pipeline.encode_prompt([prompt], device='cpu', **guidance, **length)[0][0]
        assert ours.embeds.dtype == theirs.dtype == torch.bfloat16
        assert torch.equal(ours.embeds[i, : len(theirs)], theirs)


@pytest.mark.parametrize('kind', ['qwen-image', 'z-image'])
def test_prompts_of_different_lengths_are_padded(kind, encoder):
    encode = encoder(kind)
    ours = encode(PROMPTS)
    alone = [encode([prompt]) for prompt in PROMPTS]
    assert all(single.mask is None for single in alone)
    assert ours.mask.sum(1).tolist() == [single.embeds.shape[1] for single in alone]
    assert len(set(ours.mask.sum(1).tolist())) == 3
    for i, single in enumerate(alone):
        n = single.embeds.shape[1]
        assert torch.equal(ours.embeds[i, :n], single.embeds[0]) and not ours.embeds[i, n:].any()
        assert ours.mask[i].tolist() == [1] * n + [0] * (ours.embeds.shape[1] - n)
    assert encode([PROMPTS[0], PROMPTS[0]]).mask is None


@pytest.mark.parametrize('kind', ['pixart-alpha', 'sd3', 'flux2-klein', 'qwen-image', 'sana', 'z-image'])
def test_sequence_length(kind, encoder):
    encode = encoder(kind, max_sequence_length=9)
    encoded = encode([PROMPTS[0], 'a horse ' * 20])
    assert encoded.embeds.shape[1] == 9 + 77 * (kind == 'sd3')
    assert encode.fingerprint != encoder(kind).fingerprint
    with pytest.raises(ValueError, match='max_sequence_length is 0'):
        encoder(kind, max_sequence_length=0)


def test_fixed_sequence_lengths(encoder):
    with pytest.raises(ValueError, match=r'max_sequence_length is 9, but .* fixed numbers of tokens'):
        encoder('hunyuan-dit', max_sequence_length=9)(PROMPTS)


# ---- the cache on disk


def test_encoders_are_loaded_only_for_what_is_not_on_disk(encoder, forbid_encoders, pipeline_folder, tmp_path):
    first = encoder('hunyuan-dit')
    expected = first(PROMPTS).by_name
    forbid_encoders()
    again = encoder('hunyuan-dit', model=Path(shutil.copytree(pipeline_folder('hunyuan-dit'), tmp_path / 'copy')))
    assert_same(again(PROMPTS[::-1]).by_name, {name: x.flip(0) for name, x in expected.items()})
    assert again.fingerprint == first.fingerprint
    with pytest.raises(AssertionError, match='was loaded'):
        again(['another'])


def changed(folder: Path, copy: Path, what: str) -> dict:
    """Options of an encoder of a copy of which something is changed."""
    shutil.copytree(folder, copy)
    if what == 'weights':
        path = copy / 'text_encoder_2' / 'model.safetensors'
        save_file({name: x * 1.01 for name, x in load_file(path).items()}, path, {'format': 'pt'})
    elif what in ('tokenizer', 'config'):
        path = copy / {'tokenizer': 'tokenizer_2/tokenizer_config.json', 'config': 'text_encoder/config.json'}[what]
        key, value = {'tokenizer': ('pad_token', '</s>'), 'config': ('hidden_act', 'gelu')}[what]
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    options = {'length': {'max_sequence_length': 7}, 'dtype': {'dtype': torch.bfloat16}}.get(what, {})
    return {'model': copy, **options}


@pytest.mark.parametrize('what', ['weights', 'tokenizer', 'config', 'length', 'dtype'])
def test_the_key_is_all_that_embeddings_depend_on(what, encoder, pipeline_folder, tmp_path, monkeypatch):
    first = encoder('flux')
    first(PROMPTS)
    other = encoder('flux', **changed(pipeline_folder('flux'), tmp_path / 'other', what))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_prompts, '_load_encoder', lambda *args: pytest.fail('was loaded', pytrace=False))
        with pytest.raises(pytest.fail.Exception, match='was loaded'):
            other(PROMPTS)
    assert other.fingerprint != first.fingerprint
    values = [torch.cat([x[:, :7].flatten().float() for x in encode(PROMPTS).tensors]) for encode in (first, other)]
    assert not torch.equal(*values)


@pytest.mark.parametrize('kind', ['flux2', 'z-image'])
def test_templates_are_in_the_key(kind, encoder, pipeline_folder, tmp_path, monkeypatch):
    first = encoder(kind)
    expected = first(PROMPTS[:1])
    copy = Path(shutil.copytree(pipeline_folder(kind), tmp_path / 'other'))
    if kind == 'flux2':
        monkeypatch.setattr('diffusers.pipelines.flux2.pipeline_flux2.SYSTEM_MESSAGE', 'You are a painter.')
    else:
        template = copy / 'tokenizer' / 'chat_template.jinja'
        template.write_text('{{ messages[0]["content"] }}!')
    other = encoder(kind, model=copy)
    ours = other(PROMPTS[:1])
    assert ours.embeds.shape != expected.embeds.shape or not torch.equal(ours.embeds, expected.embeds)
    assert other.fingerprint != first.fingerprint


def test_a_damaged_file_is_encoded_anew(encoder, tmp_path, caplog):
    expected = encoder('z-image')(PROMPTS[:1]).embeds
    (path,) = (tmp_path / 'cache').iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(encoder('z-image')(PROMPTS[:1]).embeds, expected)
    assert f'its file {path} is damaged' in caplog.text


def test_encoders_are_freed(encoder, monkeypatch):
    alive, load = [], pipeline_prompts._load_encoder

    def watched(*args):
        loaded = load(*args)
        alive.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(pipeline_prompts, '_load_encoder', watched)
    monkeypatch.setattr(prompt_store, 'CHUNK', 2)
    encode = encoder('sd3')
    encode.prepare(PROMPTS)  # more than one chunk: they are loaded once
    gc.collect()
    assert len(alive) == 3 and all(reference() is None for reference in alive)
    with pytest.raises(ValueError, match='sequence of one or more prompts'):
        encode([])


def test_a_hub_ids_embeddings_can_be_used_without_its_weights(encoder, tmp_path, monkeypatch):
    expected = encoder('flux')(PROMPTS)
    options = {'model': 'nobody/nothing', 'network': 'FluxTransformer2DModel'}
    with monkeypatch.context() as patch:
        pipeline = encoder('flux')._load()
        patch.setattr(PipelinePromptEncoder, '_load', lambda self: pipeline)
        patch.setattr(PipelinePromptEncoder, '_encoders_digest', lambda self: 'digest')
        encoder('flux', **options)(PROMPTS)
    monkeypatch.setattr(pipeline_prompts, '_index', lambda source: pytest.fail('the hub was asked'))
    other = encoder('flux', **options)
    assert_same(other(PROMPTS).by_name, expected.by_name)
    assert other.fingerprint == 'digest'
    with pytest.raises(pytest.fail.Exception, match='the hub was asked'):
        encoder('flux', revision='other', **options)(PROMPTS)


# ---- pipelines and their parts


def test_pipelines_are_found(pipeline_folder, tmp_path):
    for kind in KINDS:
        name = find_pipeline(find_source(pipeline_folder(kind)))
        assert name == tiny_pipelines.KINDS[kind].pipeline.__name__ and name in ENCODINGS
    hub = ModelSource('hub', 'nobody/nothing')  # not read
    assert find_pipeline(hub, 'FluxTransformer2DModel') == 'FluxPipeline'
    copy = Path(shutil.copytree(pipeline_folder('lumina2'), tmp_path / 'lumina2'))
    index = copy / 'model_index.json'
    index.write_text(index.read_text().replace('Lumina2Pipeline', 'Lumina2Text2ImgPipeline'))  # as it was published
    assert find_pipeline(find_source(copy)) == 'Lumina2Pipeline'
    copy = Path(shutil.copytree(pipeline_folder('pixart-alpha'), tmp_path / 'pixart'))
    (copy / 'model_index.json').unlink()
    with pytest.raises(ValueError, match=r'belongs to PixArtAlphaPipeline and PixArtSigmaPipeline; say which with'):
        find_pipeline(find_source(copy))
    with pytest.raises(ValueError, match=r'names DiTPipeline\) with a DiTTransformer2DModel; supported are .*Flux'):
        find_pipeline(find_source(pipeline_folder('dit')))
    shutil.rmtree(copy / 'transformer')
    with pytest.raises(OSError, match=r'cannot read .*transformer'):
        find_pipeline(find_source(copy))


def test_a_folder_without_index(encoder, pipeline_folder, tmp_path):
    expected = encoder('pixart-alpha')(PROMPTS)
    copy = Path(shutil.copytree(pipeline_folder('pixart-alpha'), tmp_path / 'copy'))
    for path in (copy / 'model_index.json', copy / 'transformer'):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    options = {'model': copy, 'cache_dir': tmp_path / 'new'}
    ours = encoder('pixart-alpha', pipeline='PixArtAlphaPipeline', **options)(PROMPTS)
    assert_same(ours.by_name, expected.by_name)
    assert encoder('pixart-alpha', pipeline='PixArtSigmaPipeline', **options)(PROMPTS).embeds.shape[1] == 300
    with pytest.raises(ValueError, match=r"pipeline is 'StableDiffusionPipeline'; it is one of PixArtAlphaPipeline"):
        encoder('pixart-alpha', pipeline='StableDiffusionPipeline')


def test_missing_and_damaged_parts(encoder, pipeline_folder, tmp_path):
    copy = Path(shutil.copytree(pipeline_folder('flux'), tmp_path / 'copy'))
    encode = lambda: encoder('flux', model=copy)(PROMPTS)  # noqa: E731
    weights = copy / 'text_encoder_2' / 'model.safetensors'
    state = load_file(weights)
    kept = {name: x for name, x in state.items() if 'layer_norm' not in name}
    save_file(kept, weights, {'format': 'pt'})
    with pytest.raises(OSError, match=r'text_encoder_2 of .* lacks \d+ tensors, such as encoder'):
        encode()
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(OSError, match=r'text_encoder_2/model.safetensors'):
        encode()
    weights.unlink()
    with pytest.raises(OSError, match=r'cannot read .*text_encoder_2.*config.json'):
        encode()
    shutil.rmtree(copy / 'tokenizer_2')
    with pytest.raises(OSError, match=r'has no tokenizer_2/.* Precomputed embeddings'):
        encode()


def test_the_tokenizer_of_a_processor(encoder, pipeline_folder, tmp_path):
    """FLUX.2 names Mistral's processor of images and text, which needs torchvision."""
    copy = Path(shutil.copytree(pipeline_folder('flux2'), tmp_path / 'copy'))
    index = copy / 'model_index.json'
    processor = ['transformers', 'PixtralProcessor']
    index.write_text(json.dumps({**json.loads(index.read_text()), 'tokenizer': processor}))
    ours = encoder('flux2', model=copy, cache_dir=tmp_path / 'new')
    assert_same(ours(PROMPTS[:1]).by_name, encoder('flux2')(PROMPTS[:1]).by_name)


def test_tokenizers_of_sentencepiece(encoder, pipeline_folder, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(pipeline_folder('pixart-sigma'), tmp_path / 'copy'))
    (copy / 'tokenizer' / 'tokenizer.json').unlink()
    SentencePieceTrainer.train(
        sentence_iterator=iter(PROMPTS * 20),
        model_prefix=str(copy / 'tokenizer' / 'spiece'),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    ours = encoder('pixart-sigma', model=copy)([PROMPTS[2]])
    assert_same(ours.by_name, texts_of_network(copy, PROMPTS[2], guidance_scale=0.0)[0])
    assert not torch.equal(ours.mask, encoder('pixart-sigma')([PROMPTS[2]]).mask)
    monkeypatch.setitem(BACKENDS_MAPPING, 'sentencepiece', (lambda: False, 'no {0}'))
    monkeypatch.setattr(pipeline_prompts, 'is_sentencepiece_available', lambda: False)
    with pytest.raises(ImportError, match=r"tokenizer of .* SentencePiece model, .*pip install 'diffseg\[text\]'"):
        encoder('pixart-sigma', model=copy)(PROMPTS)


@pytest.mark.parametrize('entry', [['evil', 'T5EncoderModel'], ['transformers', 'pipeline'], [None, None], 'evil'])
def test_classes_of_other_kinds_are_not_used(entry, encoder, pipeline_folder, tmp_path):
    copy = Path(shutil.copytree(pipeline_folder('pixart-sigma'), tmp_path / 'copy'))
    index = copy / 'model_index.json'
    index.write_text(json.dumps({**json.loads(index.read_text()), 'text_encoder': entry}))
    assert encoder('pixart-sigma', model=copy)(PROMPTS).embeds.shape == (3, 300, 16)  # as config.json says
    config = copy / 'text_encoder' / 'config.json'
    config.write_text(json.dumps({**json.loads(config.read_text()), 'architectures': ['EvilModel']}))
    with pytest.raises(OSError, match=r'names a text encoder of transformers'):
        encoder('pixart-sigma', model=copy)(PROMPTS)


def test_single_files_need_a_folder_of_text_encoders(encoder, pipeline_folder, tmp_path):
    file = tmp_path / 'flux.safetensors'
    save_file({'double_blocks.0.img_attn.qkv.weight': torch.zeros(1)}, file)
    with pytest.raises(OSError, match=r'flux.safetensors is a single file.*config=FOLDER, or give precomputed'):
        encoder('flux', model=file)(PROMPTS)
    ours = encoder('flux', model=file, config=pipeline_folder('flux'))
    assert_same(ours(PROMPTS).by_name, encoder('flux')(PROMPTS).by_name)
    assert ours.fingerprint == encoder('flux').fingerprint


# ---- the encoder of a class of networks


def test_each_network_has_its_encoder(pipeline_folder, tiny_pipeline, tmp_path):
    options = {'cache_dir': tmp_path, 'revision': None}
    assert type(prompt_encoder(tiny_pipeline, 'UNet2DConditionModel', truncate=True, **options)) is PromptEncoder
    for network in ('UNet2DModel', 'DiTTransformer2DModel'):
        encode = prompt_encoder(pipeline_folder('dit'), network, **options)
        assert type(encode) is NoPromptEncoder and encode.for_negative_prompts()([''] * 2).embeds.shape == (2, 0, 0)
    encode = prompt_encoder(
        pipeline_folder('flux'), 'FluxTransformer2DModel', max_sequence_length=16, dtype=torch.float32, **options
    )
    assert encode(PROMPTS).embeds.shape == (3, 16, 32)
    assert encode.encoders == ('text_encoder', 'text_encoder_2')


def test_options_of_other_networks_are_refused(pipeline_folder, tiny_pipeline):
    flux = pipeline_folder('flux')
    with pytest.raises(ValueError, match='UNet2DConditionModel are encoded without max_sequence_length; leave'):
        prompt_encoder(tiny_pipeline, 'UNet2DConditionModel', max_sequence_length=9)
    with pytest.raises(ValueError, match='FluxTransformer2DModel are encoded without textual_inversion; leave out'):
        prompt_encoder(flux, 'FluxTransformer2DModel', textual_inversion=['token.pt'])
    state = {'text_encoder.layer.lora_A.weight': torch.zeros(1)}
    weights = [LoraWeights('style.safetensors', 1.0, '0', x, None, None) for x in (state, {'transformer.x': 0})]
    assert prompt_encoder(flux, 'FluxTransformer2DModel', lora_weights=weights[1:])
    with pytest.raises(ValueError, match=r'style.safetensors has LoRA weights of text encoders.* FluxTransformer2D'):
        prompt_encoder(flux, 'FluxTransformer2DModel', lora_weights=weights)

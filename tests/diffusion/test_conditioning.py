import gc
import json
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import ldm
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffseg.diffusion import conditioning, prompt_store
from diffseg.diffusion.conditioning import PromptEncoder, encode_prompts
from diffseg.diffusion.embeddings import Conditioning
from diffseg.diffusion.prompt_store import default_cache_dir

PROMPTS = ['a photo of a horse', '', 'two dogs, and: an elephant!']
LONG = 'a highly realistic photo that may contain an aeroplane, a bicycle, a bird, a boat, a bottle, a bus or a car'
KINDS = {'tiny_pipeline': StableDiffusionPipeline, 'tiny_sdxl_pipeline': StableDiffusionXLPipeline}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Path:
    """Both kinds, one after the other."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def forbid_encoders(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, loading a text encoder fails."""

    def fail(*args, **kwargs):
        raise AssertionError('a text encoder was loaded')

    return lambda: monkeypatch.setattr(conditioning, '_load', fail)


def pipeline_of(model: Path):
    cls = StableDiffusionXLPipeline if (model / 'text_encoder_2').is_dir() else StableDiffusionPipeline
    return cls.from_pretrained(model)


def test_encoders_are_read_from_a_folder_in_silence(model, tmp_path, capsys):
    PromptEncoder(model, cache_dir=tmp_path)(['a horse'])
    assert capsys.readouterr() == ('', '')


def test_agrees_with_the_pipelines(model, tmp_path):
    ours = encode_prompts(model, PROMPTS, cache_dir=tmp_path)
    pipeline = pipeline_of(model)
    with torch.no_grad():
        theirs = pipeline.encode_prompt(
            PROMPTS, device='cpu', num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    torch.testing.assert_close(ours.embeds, theirs[0])
    assert ours.embeds.shape[:2] == (3, 77)
    if ours.pooled is None:
        assert isinstance(pipeline, StableDiffusionPipeline)
    else:
        torch.testing.assert_close(ours.pooled, theirs[2])


def test_time_ids_agree_with_the_pipeline(tiny_sdxl_pipeline, tmp_path):
    pipeline = pipeline_of(tiny_sdxl_pipeline)
    theirs = pipeline._get_add_time_ids((96, 64), (0, 0), (96, 64), torch.float32, text_encoder_projection_dim=32)
    kwargs = encode_prompts(tiny_sdxl_pipeline, ['x'], cache_dir=tmp_path).unet_kwargs([0, 0], size=(96, 64))
    assert torch.equal(kwargs['added_cond_kwargs']['time_ids'], theirs.expand(2, -1))
    assert theirs.tolist() == [[96, 64, 0, 0, 96, 64]]


def test_the_unet_takes_what_it_gives(model, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(model, subfolder='unet', torch_dtype=torch.bfloat16)
    kwargs = encode_prompts(model, PROMPTS, cache_dir=tmp_path).unet_kwargs([2, 0], (64, 2049), dtype=torch.bfloat16)
    assert kwargs['encoder_hidden_states'].dtype == torch.bfloat16
    with torch.no_grad():
        out = unet(torch.randn(2, 4, 8, 8, dtype=torch.bfloat16), 50, **kwargs).sample
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    if added := kwargs['added_cond_kwargs']:
        assert added['time_ids'].tolist() == [[64, 2049, 0, 0, 64, 2049]] * 2


def test_rows_are_chosen_by_index_and_keep_gradients():
    embeds = torch.randn(3, 7, 4, requires_grad=True)
    kwargs = Conditioning(embeds, torch.randn(3, 5)).unet_kwargs(torch.tensor([2, 2, 0]), (8, 8))
    assert torch.equal(kwargs['encoder_hidden_states'], embeds[[2, 2, 0]])
    kwargs['encoder_hidden_states'].sum().backward()
    assert embeds.grad[:, 0, 0].tolist() == [1, 0, 2]


def test_encoders_are_loaded_only_for_what_is_not_on_disk(model, tmp_path, monkeypatch):
    first = encode_prompts(model, PROMPTS[:2], cache_dir=tmp_path)
    loaded = []
    load = conditioning._load
    monkeypatch.setattr(conditioning, '_load', lambda source, part: loaded.append(part) or load(source, part))
    again = encode_prompts(model, [PROMPTS[1], PROMPTS[0], PROMPTS[1]], cache_dir=tmp_path)
    assert not loaded
    assert torch.equal(again.embeds, first.embeds[[1, 0, 1]])
    assert again.pooled is None or torch.equal(again.pooled, first.pooled[[1, 0, 1]])
    mixed = encode_prompts(model, PROMPTS, cache_dir=tmp_path)
    assert loaded == (['text_encoder'] if first.pooled is None else ['text_encoder', 'text_encoder_2'])
    assert torch.equal(mixed.embeds[:2], first.embeds)


def test_the_key_is_the_content(tiny_pipeline, tmp_path, forbid_encoders):
    cache, copy = tmp_path / 'cache', Path(shutil.copytree(tiny_pipeline, tmp_path / 'copy'))
    encode_prompts(tiny_pipeline, PROMPTS, cache_dir=cache)
    forbid_encoders()
    encode_prompts(copy, PROMPTS, cache_dir=cache)  # another place
    shutil.rmtree(copy / 'vae')
    (copy / 'unet' / 'diffusion_pytorch_model.safetensors').unlink()
    encode_prompts(copy, PROMPTS, cache_dir=cache)  # other parts
    weights = copy / 'text_encoder' / 'model.safetensors'
    original = load_file(weights)
    save_file({name: tensor * 1.01 for name, tensor in original.items()}, weights, {'format': 'pt'})
    with pytest.raises(AssertionError, match='was loaded'):
        encode_prompts(copy, PROMPTS, cache_dir=cache)
    save_file(original, weights, {'format': 'pt'})
    encode_prompts(copy, PROMPTS, cache_dir=cache)
    tokenizer = copy / 'tokenizer' / 'tokenizer_config.json'
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), 'model_max_length': 50}))
    with pytest.raises(AssertionError, match='was loaded'):
        encode_prompts(copy, PROMPTS, cache_dir=cache)


def test_a_damaged_file_is_encoded_anew(model, tmp_path, caplog):
    expected = encode_prompts(model, PROMPTS[:1], cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (b'', whole[:-7], b'x' * len(whole)):
        path.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            assert torch.equal(encode_prompts(model, PROMPTS[:1], cache_dir=tmp_path).embeds, expected.embeds)
        assert str(path) in caplog.text
        assert load_file(path).keys() >= {'embeds'}
    assert list(tmp_path.iterdir()) == [path]  # no temporary files


def test_an_interrupted_write_leaves_nothing(tiny_pipeline, tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prompt_store.os, 'replace', fail)
    with pytest.raises(KeyboardInterrupt):
        encode_prompts(tiny_pipeline, PROMPTS, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_encoders_are_freed(model, tmp_path, monkeypatch):
    alive = []
    load = conditioning._load

    def watched(source, part):
        gc.collect()
        assert all(encoder() is None for encoder in alive)  # the first is gone before the second comes
        tokenizer, encoder = load(source, part)
        alive.append(weakref.ref(encoder))
        return tokenizer, encoder

    monkeypatch.setattr(conditioning, '_load', watched)
    encode_prompts(model, PROMPTS, cache_dir=tmp_path)
    gc.collect()
    assert alive and all(encoder() is None for encoder in alive)


def test_long_prompts_are_cut_into_chunks(model, tmp_path):
    tokenizer = pipeline_of(model).tokenizer
    ids = tokenizer(LONG).input_ids
    assert len(ids) > 77 and len(LONG.split()) < 70  # GDF would truncate it
    ours = encode_prompts(model, [LONG], cache_dir=tmp_path)
    assert ours.embeds.shape[1] == len(ids)
    encoders = [CLIPTextModel.from_pretrained(model, subfolder='text_encoder')]
    if ours.pooled is not None:
        encoders.append(CLIPTextModelWithProjection.from_pretrained(model, subfolder='text_encoder_2'))
    for start in (0, 77):
        chunk = torch.tensor([ids[start : start + 77]])
        with torch.no_grad():
            outputs = [encoder(chunk, output_hidden_states=True) for encoder in encoders]
        pair = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        expected = outputs[0].last_hidden_state if ours.pooled is None else pair
        torch.testing.assert_close(ours.embeds[:, start : start + 77], expected)
    if ours.pooled is not None:  # of the truncated prompt
        with torch.no_grad():
            torch.testing.assert_close(
                ours.pooled, pipeline_of(model).encode_prompt(LONG, do_classifier_free_guidance=False)[2]
            )


def test_a_prompt_of_just_77_tokens_is_not_long(tiny_pipeline, tmp_path):
    tokenizer = pipeline_of(tiny_pipeline).tokenizer
    just = 'x' * 75
    assert len(tokenizer(just).input_ids) == 77
    encoded = [encode_prompts(tiny_pipeline, [p], cache_dir=tmp_path).embeds.shape[1] for p in (just, just + 'x')]
    assert encoded == [77, 78]


def test_prompts_of_different_lengths_are_refused(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match=r'different numbers of tokens.*77 for'):
        encode_prompts(tiny_pipeline, [PROMPTS[0], LONG], cache_dir=tmp_path)
    for prompts in ([], 'a horse'):
        with pytest.raises(ValueError, match=r'sequence'):
            encode_prompts(tiny_pipeline, prompts, cache_dir=tmp_path)


def test_text_encoders_of_older_layout_are_read(tiny_pipeline, tmp_path):
    """Published files have `text_model.` before every name, which transformers 5 dropped."""
    old = Path(shutil.copytree(tiny_pipeline, tmp_path / 'old'))
    state = load_file(old / 'text_encoder' / 'model.safetensors')
    state = {f'text_model.{name.removeprefix("text_model.")}': tensor for name, tensor in state.items()}
    state['text_model.embeddings.position_ids'] = torch.arange(77).unsqueeze(0)
    save_file(state, old / 'text_encoder' / 'model.safetensors', {'format': 'pt'})
    ours = [encode_prompts(folder, PROMPTS, cache_dir=tmp_path / folder.name) for folder in (tiny_pipeline, old)]
    assert torch.equal(ours[0].embeds, ours[1].embeds)


def test_a_single_files_text_encoder_is_used(tiny_pipeline, tmp_path):
    state = {
        name: tensor * 1.5 if 'cond_stage' in name else tensor for name, tensor in ldm.sd15_state(tiny_pipeline).items()
    }
    save_file(state, tmp_path / 'model.safetensors')
    other = Path(shutil.copytree(tiny_pipeline, tmp_path / 'other'))
    weights = other / 'text_encoder' / 'model.safetensors'
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights, {'format': 'pt'})
    cache = tmp_path / 'cache'
    ours = encode_prompts(tmp_path / 'model.safetensors', PROMPTS, config=tiny_pipeline, cache_dir=cache)
    assert torch.equal(ours.embeds, encode_prompts(other, PROMPTS, cache_dir=cache).embeds)
    assert not torch.equal(ours.embeds, encode_prompts(tiny_pipeline, PROMPTS, cache_dir=cache).embeds)
    save_file(
        ldm.unet_state(UNet2DConditionModel.from_pretrained(other, subfolder='unet')), tmp_path / 'unet.safetensors'
    )
    with pytest.raises(OSError, match=r'no text encoder'):
        encode_prompts(tmp_path / 'unet.safetensors', PROMPTS, config=tiny_pipeline, cache_dir=cache)


def test_a_hub_ids_embeddings_can_be_used_without_its_weights(tmp_path, monkeypatch, forbid_encoders):
    forbid_encoders()

    def run(self, prompts, load):
        return [{'embeds': torch.ones(77, 2048), 'pooled': torch.ones(1280)} for _ in prompts]

    with monkeypatch.context() as patch:
        patch.setattr(PromptEncoder, '_run', run)
        patch.setattr(PromptEncoder, '_encoders_digest', lambda self: 'digest')
        encode_prompts('sdxl', ['x'], cache_dir=tmp_path)
    encoder = PromptEncoder('sdxl', cache_dir=tmp_path)
    encoder(['x'])
    assert encoder.fingerprint == 'digest'
    assert encode_prompts('sdxl', ['x'], cache_dir=tmp_path, dtype=torch.float16).pooled.dtype == torch.float16
    for model, options in (('sdxl-turbo', {}), ('sdxl', {'revision': 'main'})):
        with pytest.raises(AssertionError, match='was loaded'):
            encode_prompts(model, ['x'], cache_dir=tmp_path, **options)


def changed_encoder(folder: Path, part: str, what: str) -> None:
    if what == 'weights':
        path = folder / part / 'model.safetensors'
        save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, {'format': 'pt'})
        return
    where = {'hidden_act': (part, 'config.json'), 'pad_token': ('tokenizer', 'tokenizer_config.json')}[what]
    path = folder.joinpath(*where)
    value = {'hidden_act': 'gelu', 'pad_token': '!'}[what]
    path.write_text(json.dumps({**json.loads(path.read_text()), what: value}))


@pytest.mark.parametrize(
    ('part', 'what'),
    [
        ('text_encoder', 'weights'),
        ('text_encoder_2', 'weights'),
        ('text_encoder', 'hidden_act'),
        ('text_encoder', 'pad_token'),
    ],
)
def test_the_fingerprint_is_that_of_the_encoders(tiny_sdxl_pipeline, tmp_path, part, what):
    copy = Path(shutil.copytree(tiny_sdxl_pipeline, tmp_path / 'copy'))
    caches = iter(range(9))

    def fingerprint(folder: Path) -> str:
        return PromptEncoder(folder, cache_dir=tmp_path / f'{next(caches)}').fingerprint

    expected = fingerprint(tiny_sdxl_pipeline)
    assert fingerprint(copy) == expected
    changed_encoder(copy, part, what)
    assert fingerprint(copy) != expected


def test_the_fingerprint_of_a_single_file_is_that_of_its_folder(tiny_pipeline, tmp_path):
    save_file(ldm.sd15_state(tiny_pipeline), tmp_path / 'model.safetensors')
    file = PromptEncoder(tmp_path / 'model.safetensors', config=tiny_pipeline, cache_dir=tmp_path)
    assert file.fingerprint == PromptEncoder(tiny_pipeline, cache_dir=tmp_path).fingerprint


def test_the_fingerprint_is_kept_with_embeddings(tiny_pipeline, tmp_path, forbid_encoders):
    first = PromptEncoder(tiny_pipeline, cache_dir=tmp_path)
    first(['a horse'])
    forbid_encoders()
    assert first.fingerprint
    later = PromptEncoder(tiny_pipeline, cache_dir=tmp_path)
    later(['a horse'])
    assert later.fingerprint == first.fingerprint
    with pytest.raises(AssertionError, match='was loaded'):
        PromptEncoder(tiny_pipeline, cache_dir=tmp_path).fingerprint  # noqa: B018


def test_missing_and_damaged_encoders(tiny_pipeline, tmp_path):
    folder, cache = Path(shutil.copytree(tiny_pipeline, tmp_path / 'model')), tmp_path / 'cache'
    weights = folder / 'text_encoder' / 'model.safetensors'
    state = load_file(weights)
    save_file({name: state[name] for name in list(state)[1:]}, weights, {'format': 'pt'})
    with pytest.raises(OSError, match=r'text_encoder.*lacks 1 tensors'):
        encode_prompts(folder, PROMPTS, cache_dir=cache)
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(OSError, match=r'model.safetensors'):
        encode_prompts(folder, PROMPTS, cache_dir=cache)
    weights.unlink()
    with pytest.raises(OSError, match=r'(?s)text_encoder.*holds: config.json'):
        encode_prompts(folder, PROMPTS, cache_dir=cache)
    shutil.rmtree(folder / 'text_encoder')
    with pytest.raises(OSError, match=r'no text_encoder/'):
        encode_prompts(folder, PROMPTS, cache_dir=cache)


def test_where_embeddings_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv('DIFFSEG_CACHE', str(tmp_path))
    assert default_cache_dir() == tmp_path / 'prompts'
    monkeypatch.delenv('DIFFSEG_CACHE')
    assert default_cache_dir() == Path.home() / '.cache' / 'diffseg' / 'prompts'


def test_many_prompts_are_prepared_a_few_at_a_time(model, tmp_path, monkeypatch, forbid_encoders):
    loaded, alive, load = [], [], conditioning._load

    def watched(source, part):
        tokenizer, encoder = load(source, part)
        loaded.append(part)
        alive.append(weakref.ref(encoder))
        return tokenizer, encoder

    monkeypatch.setattr(conditioning, '_load', watched)
    monkeypatch.setattr(prompt_store, 'CHUNK', 4)
    monkeypatch.setattr(prompt_store, 'RECENT', 2)
    prompts = [f'horse {i}' for i in range(10)]
    encoder = PromptEncoder(model, cache_dir=tmp_path)
    encoder.prepare(prompts)
    assert loaded == list(encoder.encoders) and len(list(tmp_path.iterdir())) == 10
    gc.collect()
    assert all(encoder() is None for encoder in alive)
    forbid_encoders()
    embeds = torch.cat([encoder(prompts[i : i + 5]).embeds for i in (0, 5)])
    assert len(encoder._recent) == 2
    other = PromptEncoder(model, cache_dir=tmp_path)
    other.prepare(prompts)
    assert torch.equal(other([prompts[7]]).embeds, embeds[7:8])


def test_a_file_damaged_after_preparing_is_encoded_anew(tiny_pipeline, tmp_path):
    encoder = PromptEncoder(tiny_pipeline, cache_dir=tmp_path)
    encoder.prepare(PROMPTS)
    expected = encoder(PROMPTS).embeds
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert torch.equal(PromptEncoder(tiny_pipeline, cache_dir=tmp_path)(PROMPTS).embeds, expected)


def test_truncated_prompts_are_those_of_the_pipeline(model, tmp_path):
    chunked = encode_prompts(model, [LONG], cache_dir=tmp_path)
    ours = encode_prompts(model, [LONG, PROMPTS[0]], cache_dir=tmp_path, truncate=True)
    with torch.no_grad():
        theirs = pipeline_of(model).encode_prompt(
            [LONG], device='cpu', num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
    torch.testing.assert_close(ours.embeds[:1], theirs)
    assert chunked.embeds.shape[1] > ours.embeds.shape[1] == 77


# ---- embeddings of classes

CLASSES, TEMPLATES = ['horse', 'traffic light'], ['a photo of a {}.', 'the {}']


def test_a_class_is_the_mean_of_pooled_embeddings(tiny_pipeline, tmp_path, forbid_encoders):
    encoder = PromptEncoder(tiny_pipeline, cache_dir=tmp_path)
    ours = encoder.class_embeddings(CLASSES, TEMPLATES)
    pipeline = pipeline_of(tiny_pipeline)
    for name, embedding in zip(CLASSES, ours, strict=True):
        pooled = []
        for template in TEMPLATES:  # one by one, and so each without padding
            ids = pipeline.tokenizer(template.format(name), return_tensors='pt').input_ids
            with torch.no_grad():
                pooled.append(pipeline.text_encoder(ids).pooler_output[0])
        torch.testing.assert_close(embedding, torch.stack(pooled).mean(0))
    forbid_encoders()
    assert torch.equal(PromptEncoder(tiny_pipeline, cache_dir=tmp_path).class_embeddings(CLASSES, TEMPLATES), ours)
    with pytest.raises(AssertionError, match='was loaded'):
        encoder.class_embeddings(CLASSES[::-1], TEMPLATES)


def test_templates_and_models_without_class_embeddings(tiny_pipeline, tiny_sdxl_pipeline):
    with pytest.raises(ValueError, match=r"\['a photo'\] have no '{}'"):
        PromptEncoder(tiny_pipeline).class_embeddings(CLASSES, ['a photo', 'the {}'])
    with pytest.raises(ValueError, match='have no'):
        PromptEncoder(tiny_pipeline).class_embeddings(CLASSES, [])
    with pytest.raises(ValueError, match='two text encoders'):
        PromptEncoder(tiny_sdxl_pipeline).class_embeddings(CLASSES, TEMPLATES)

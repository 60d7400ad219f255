"""Tests for diffseg.diffusion.textual_inversion, and of learned tokens in prompts."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

from diffseg.diffusion.conditioning import PromptEncoder
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.textual_inversion import read_inversion

PROMPT = 'a photo of <toy>, two of them'


def vectors(n: int, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def saved(path: Path, state) -> Path:
    save_file(state, path) if path.suffix == '.safetensors' else torch.save(state, path)
    return path


FORMATS = {
    'learned_embeds.safetensors': {'<toy>': vectors(2)},
    'learned_embeds.bin': {'<toy>': vectors(1)[0]},
    'webui.pt': {
        'string_to_token': {'*': 265},
        'string_to_param': {'*': torch.nn.Parameter(vectors(3))},
        'name': '<toy>',
        'step': 100,
    },
    '<toy>.safetensors': {'emb_params': vectors(2)},
    '<toy>.pt': vectors(2),
}


@pytest.mark.parametrize('name', FORMATS)
def test_agrees_with_the_pipeline(tiny_pipeline, tmp_path, name):
    path = saved(tmp_path / name, FORMATS[name])
    ours = PromptEncoder(tiny_pipeline, cache_dir=tmp_path / 'cache', textual_inversion=[path])([PROMPT])
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipeline.load_textual_inversion(str(path), token='<toy>')
    with torch.no_grad():
        theirs = pipeline.encode_prompt(PROMPT, 'cpu', 1, do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(ours.embeds, theirs)


def test_agrees_with_the_pipeline_of_two_encoders(tiny_sdxl_pipeline, tmp_path):
    state = {'clip_l': vectors(2, seed=1), 'clip_g': vectors(2, seed=2)}
    path = saved(tmp_path / '<toy>.safetensors', state)
    ours = PromptEncoder(tiny_sdxl_pipeline, cache_dir=tmp_path / 'cache', textual_inversion=[path])([PROMPT])
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_pipeline)
    for key, end in (('clip_l', ''), ('clip_g', '_2')):
        parts = {part: getattr(pipeline, f'{part}{end}') for part in ('tokenizer', 'text_encoder')}
        pipeline.load_textual_inversion(state[key], token='<toy>', **parts)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours.embeds, embeds)
    torch.testing.assert_close(ours.pooled, pooled)


def test_the_files_content_belongs_to_key_and_fingerprint(tiny_pipeline, tmp_path):
    path, other = (saved(tmp_path / name, {'<toy>': vectors(2)}) for name in ('a.safetensors', 'b.safetensors'))
    cache = {'cache_dir': tmp_path / 'cache'}

    def build(path: Path) -> DiffusionExtractor:
        weights = {'textual_inversion': [path]}
        return DiffusionExtractor(tiny_pipeline, ['unet-out'], [50], prompt=PROMPT, weights=weights, runtime=cache)

    first, moved = build(path), build(other)
    assert len(list((tmp_path / 'cache').iterdir())) == 1 and first.fingerprint == moved.fingerprint
    saved(path, {'<toy>': vectors(2, seed=5)})
    changed = build(path)
    assert len(list((tmp_path / 'cache').iterdir())) == 2 and first.fingerprint != changed.fingerprint
    images = torch.zeros(1, 3, 64, 64)
    assert not torch.equal(first(images)['unet-out'], changed(images)['unet-out'])
    plain = DiffusionExtractor(tiny_pipeline, ['unet-out'], [50], prompt=PROMPT, runtime=cache)
    assert not torch.equal(first(images)['unet-out'], plain(images)['unet-out'])


@pytest.mark.parametrize(
    ('state', 'message'),
    [
        ({'<toy>': vectors(2, width=48)}, '48 for text_encoder, but the text_encoder of this model needs 32'),
        ({'clip_g': vectors(2)}, r'32 for text_encoder_2, but the text_encoder of this model needs 32'),
        ({'ph': vectors(1)}, "token 'ph' of .* is known"),
        ({'a': vectors(1), 'b': vectors(1)}, r"holds \['a', 'b'\]; textual inversion is"),
        ({'string_to_param': {}}, 'textual inversion is'),
        (['<toy>'], 'holds list'),
        ({'<toy>': torch.zeros(1, 2, 3)}, 'textual inversion is'),
    ],
)
def test_files_that_do_not_fit(tiny_pipeline, tmp_path, state, message):
    path = saved(tmp_path / 'x.pt', state)
    with pytest.raises(ValueError, match=message):
        PromptEncoder(tiny_pipeline, cache_dir=tmp_path, textual_inversion=[path])(['a horse'])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(OSError, match=r'absent\.pt'):
        read_inversion(tmp_path / 'absent.pt')
    for name in ('x.pt', 'x.safetensors'):
        (tmp_path / name).write_bytes(b'nothing of the kind')
        with pytest.raises(ValueError, match=f'{name} cannot be read'):
            read_inversion(tmp_path / name)


class Harmful:
    def __reduce__(self):
        return pytest.fail, ('code of a file was run',)


def test_code_in_a_file_is_not_run(tmp_path):
    with pytest.raises(ValueError, match='cannot be read'):
        read_inversion(saved(tmp_path / 'x.pt', {'<toy>': Harmful()}))

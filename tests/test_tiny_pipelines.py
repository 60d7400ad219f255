import json

import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline

LATENTS = {  # of 64 x 96 pixels; packed ones are tokens of 2 x 2 cells
    'flux': (24, 64),
    'flux2': (24, 128),
    'flux2-klein': (32, 8, 12),
    'qwen-image': (24, 64),
    'sana': (32, 2, 3),
    'dit': (3, 128, 128),
    **dict.fromkeys(('sd3', 'sd35-medium', 'lumina2', 'z-image'), (16, 8, 12)),
}


@pytest.mark.parametrize('kind', tiny_pipelines.KINDS)
def test_diffusers_generates_with_every_folder(kind, pipeline_folder):
    folder = pipeline_folder(kind)
    row = tiny_pipelines.KINDS[kind]
    assert json.loads((folder / 'model_index.json').read_text())['_class_name'] == row.pipeline.__name__
    latent = tiny_pipelines.generate(DiffusionPipeline.from_pretrained(folder))
    assert tuple(latent.shape) == (1, *LATENTS.get(kind, (4, 8, 12)))
    assert latent.isfinite().all() and latent.std() > 0.1
    assert sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) < 2e6


@pytest.mark.parametrize('kind', tiny_pipelines.QUICK)
def test_folders_are_the_same_for_the_same_seed(kind):
    first, second, other = (tiny_pipelines.pipeline(kind, seed).transformer.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], x) for name, x in other.items() if name.endswith('bias'))


@pytest.mark.parametrize('kind', tiny_pipelines.TEXTS)
def test_tokenizers_know_the_letters_of_prompts(kind, pipeline_folder):
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder(kind), transformer=None, vae=None)
    for name in ('tokenizer', 'tokenizer_2', 'tokenizer_3'):
        if words := getattr(pipeline, name, None):
            ids = words('two dogs, an elephant').input_ids
            assert len(set(ids)) > 5 and words.unk_token_id not in ids[:-1]

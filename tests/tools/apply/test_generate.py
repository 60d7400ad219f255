"""Generated images and the activations beside them belong to one trajectory."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.latents import decode
from diffseg.diffusion.loading import load_vae

TIMESTEPS = [201, 601]


@pytest.fixture
def run(load_tool: Callable, tiny_pipeline: Path, tmp_path: Path) -> Callable[..., int]:
    main = load_tool('apply/generate').main

    def run(*options: str, prompts: tuple[str, ...] = ('A horse, red!',)) -> int:
        fixed = f'--layers dhf-1-1 up-level3-repeat2-vit-out --timesteps 201 601 --steps 5 --out {tmp_path}/out'
        return main([str(tiny_pipeline), *fixed.split(), '--device', 'cpu', '--prompt', *prompts, *options])

    return run


def test_image_and_activations_are_of_one_trajectory(run: Callable, tiny_pipeline: Path, tmp_path: Path):
    prompts = 'A horse, red!', 'a dog'
    assert run('--seed', '0', '3', '--size', '64', '128', '--save-dtype', 'float32', prompts=prompts) == 0
    names = ['a-dog-0', 'a-dog-3', 'a-horse-red-0', 'a-horse-red-3']
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == sorted(
        ['config.json', *(f'{name}.png{suffix}' for name in names for suffix in ('', '.safetensors'))]
    )
    extractor = DiffusionExtractor(
        tiny_pipeline,
        ['dhf-1-1', 'up-level3-repeat2-vit-out'],
        TIMESTEPS,
        trajectory={'type': 'generation', 'steps': 5},
        prompt='A horse, red!',
        seed=3,
    )
    with torch.no_grad():
        expected, latent = extractor.generate((64, 128))
        pixels = (decode(load_vae(tiny_pipeline), latent)[0].permute(1, 2, 0) / 2 + 0.5) * 255
    path = tmp_path / 'out' / 'a-horse-red-3.png'
    found = load_file(f'{path}.safetensors')
    assert found.keys() == expected.keys()
    for layer, x in expected.items():
        torch.testing.assert_close(found[layer], x[0])
    difference = np.asarray(Image.open(path)) - pixels.numpy()
    assert difference.shape == (64, 128, 3) and np.abs(difference).max() < 0.6
    with safe_open(f'{path}.safetensors', 'pt') as file:
        header = file.metadata()
    assert (header['prompt'], header['seed'], header['input_size']) == ('A horse, red!', '3', '64x128')
    assert json.loads(header['timesteps']) == TIMESTEPS


def test_guidance_and_negative_prompt_change_the_image_and_are_not_mixed(run: Callable, tmp_path: Path, capsys):
    assert run() == 0
    first = np.asarray(Image.open(tmp_path / 'out' / 'a-horse-red-0.png')).astype(int)
    assert run('--guidance', '1') == 2
    assert 'trajectory.guidance: 7.5 there, 1.0 here; ' in capsys.readouterr().err
    for options in (['--guidance', '1'], ['--negative-prompt', 'blurred']):
        assert run('--out', str(tmp_path / options[0]), *options) == 0
        assert np.abs(np.asarray(Image.open(tmp_path / options[0] / 'a-horse-red-0.png')) - first).max() > 1


def test_spacing_and_offset(run: Callable, tmp_path: Path, capsys):
    assert run('--spacing', 'trailing', '--timesteps', '199', '999') == 0
    trajectory = json.loads((tmp_path / 'out' / 'config.json').read_text())['trajectory']
    assert (trajectory['spacing'], trajectory['steps_offset']) == ('trailing', 1)
    assert run('--steps-offset', '0') == 2
    assert 'generation trajectory, which has 800, 600, ..., 0' in capsys.readouterr().err


def test_latents_are_decoded_by_the_vae_that_is_given(
    run: Callable, tiny_pipeline: Path, tiny_taesd: Path, tmp_path: Path
):
    assert run('--vae', str(tiny_taesd), '--size', '64') == 0
    options = {'trajectory': {'type': 'generation', 'steps': 5}, 'prompt': 'A horse, red!'}
    extractor = DiffusionExtractor(tiny_pipeline, ['dhf-1-1'], TIMESTEPS, **options)
    with torch.no_grad():
        _, latent = extractor.generate((64, 64))
        pixels = (decode(AutoencoderTiny.from_pretrained(tiny_taesd), latent)[0].permute(1, 2, 0) / 2 + 0.5) * 255
    image = np.asarray(Image.open(tmp_path / 'out' / 'a-horse-red-0.png'))
    assert np.abs(image - pixels.numpy()).max() < 0.6


def test_errors(run: Callable, capsys):
    assert run(prompts=('a dog', 'A DOG!')) == 2
    assert 'files of the same name' in capsys.readouterr().err
    assert run('--timesteps', '60') == 2
    assert 'timesteps [60] are not on the generation trajectory' in capsys.readouterr().err
    assert run('--size', '100') == 2
    assert 'must be multiples of 64' in capsys.readouterr().err


def test_models_of_pixel_space_need_no_prompt(load_tool: Callable, tiny_pixel_pipeline: Path, tmp_path: Path):
    options = f'--layers adm-1 --timesteps 0 --steps 2 --out {tmp_path} --device cpu'.split()
    assert load_tool('apply/generate').main([str(tiny_pixel_pipeline), *options]) == 0
    assert Image.open(tmp_path / 'image-0.png').size == (16, 16)
    assert load_file(tmp_path / 'image-0.png.safetensors')['up-level0-repeat1-vit-out'].shape == (1, 32, 4, 4)

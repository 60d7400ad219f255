"""Extraction with models of pixel space: no VAE, no prompt, the image itself is noised."""

import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline

from diffseg.diffusion.conditioning import Conditioning
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.latents import decode
from diffseg.diffusion.options import group_options
from diffseg.diffusion.schedules import add_noise
from diffseg.diffusion.trajectories import seeded_noise

LAYERS = ['adm-0', 'mid-vit-out', 'adm-8']
NAMES = ['up-level0-repeat0-vit-out', 'mid-vit-out', 'up-level2-repeat2-res-out']
ALPHAS = (1 - torch.linspace(0.0001, 0.02, 1000)).cumprod(0)


@pytest.fixture
def make(tiny_pixel_pipeline):
    def make(layers=LAYERS, timesteps=(50, 400), **options):
        return DiffusionExtractor(tiny_pixel_pipeline, layers, timesteps, **group_options(options))

    return make


@pytest.fixture
def images():
    return torch.rand(2, 3, 12, 20) * 2 - 1


@pytest.mark.parametrize('size', [(16, 16), (12, 20), (7, 9), (1, 3)])
def test_shapes_follow_the_sites(make, size):
    extractor = make([*LAYERS, 'unet-in', 'unet-out'])
    activations = extractor(torch.zeros(2, 3, *size))
    assert extractor.layers == [*NAMES, 'unet-in', 'unet-out'] and extractor.channels == [32, 32, 16, 3, 6]
    for name, site in extractor.sites.items():
        assert activations[name].shape == (2, 2, site.channels, *(math.ceil(side / site.stride) for side in size))


@torch.no_grad()
def test_the_image_is_noised_by_linear_betas_with_one_draw_for_all(make):
    images = torch.rand(2, 3, 10, 18) * 2 - 1
    extractor = make(['unet-in', 'unet-out', *LAYERS])
    activations = extractor(images)
    noise = seeded_noise((1, 3, 12, 20), 0, 'noise', 0)  # for the image as it is continued
    for i, t in enumerate((50, 400)):
        expected = add_noise(images, noise[..., :10, :18], ALPHAS[t])
        torch.testing.assert_close(activations['unet-in'][:, i], expected)
    whole = torch.nn.functional.pad(images, (0, 2, 0, 2), mode='reflect')
    prediction = extractor.network(add_noise(whole, noise, ALPHAS[400]), 400).sample
    torch.testing.assert_close(activations['unet-out'][:, 1], prediction[..., :10, :18])
    torch.testing.assert_close(extractor.encode(images), whole)


def test_ensembles_are_means_over_draws_and_batches_do_not_matter(make, images):
    base = make(ensemble=3)(images)
    single = make(ensemble=3, micro_batch=1)(images)
    alone = make(ensemble=3)(images[1:])
    for name in NAMES:
        torch.testing.assert_close(single[name], base[name])
        torch.testing.assert_close(alone[name][0], base[name][1])
        assert not torch.allclose(make()(images)[name], base[name])
    mean = make(['unet-in'], ensemble=3)(images)['unet-in'][:, 0]
    noise = torch.stack([seeded_noise((3, 12, 20), 0, 'noise', member) for member in range(3)]).mean(0)
    torch.testing.assert_close(mean, add_noise(images, noise, ALPHAS[50]))


def test_a_prompt_is_empty_or_absent(make, images):
    extractor = make()
    assert extractor.fingerprint == make(prompt=None).fingerprint == json.loads(json.dumps(extractor.fingerprint))
    expected = extractor(images)
    for prompts in ('', ['', ''], None):
        found = make(prompt=None)(images, prompts)
        assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    assert [name for name, _ in extractor.named_children()] == ['network', 'controls']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'prompt': 'a horse'}, "no text encoder and reads no prompt; leave out 'a horse'"),
        ({'prompt': torch.zeros(1, 77, 32)}, 'reads no prompt; leave out the embedding'),
        ({'attention_maps': ['up_self']}, "'up_self' is empty: this network has none"),
        ({'controlnet': {'model': 'canny'}, 'vae_tiling': True}, 'leave out controlnet, vae_tiling'),
        ({'lora_weights': ['style.safetensors']}, 'leave out lora_weights'),
        ({'textual_inversion': ['cat.safetensors']}, 'leave out textual_inversion'),
        ({'vae_sample': 'mode', 'scale_latent': False}, 'leave out vae_sample, scale_latent'),
        ({'trajectory': {'type': 'generation', 'guidance': 7.5}, 'timesteps': (0,)}, 'set guidance=1'),
        (
            {'trajectory': {'type': 'generation', 'negative_prompt': 'x'}, 'timesteps': (0,)},
            'leave out negative_prompt',
        ),
        ({'layers': ['adm-9']}, "unknown activation 'adm-9'"),
        ({'layers': ['up-level0-repeat0-vit-block0-cross-q']}, 'up-level0-repeat0-vit-out'),
    ],
)
def test_what_it_does_not_have_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_prompts_of_a_call_are_refused(make, images):
    with pytest.raises(ValueError, match="leave out 'a horse'"):
        make()(images, 'a horse')
    with pytest.raises(ValueError, match='leave out the embedding'):
        make()(images, Conditioning(torch.zeros(1, 77, 32)))


@pytest.mark.parametrize(
    ('trajectory', 'timesteps'),
    [('clean', (-1, 50)), ({'type': 'inversion', 'steps': 10}, (-1, 200)), ('refinement', (0, 2))],
)
def test_other_trajectories_start_from_the_image(make, images, trajectory, timesteps):
    found = make(['unet-in', *LAYERS], timesteps, trajectory=trajectory)(images)
    torch.testing.assert_close(found['unet-in'][:, 0], images)
    second = found['unet-in'][:, 1]
    assert second.isfinite().all() and torch.equal(second, images) == (trajectory == 'clean')


def test_generated_images_are_those_of_diffusers(make, tiny_pixel_pipeline):
    extractor = make(['unet-in', 'adm-3'], (200, 600), trajectory={'type': 'generation', 'steps': 5}, seed=3)
    assert extractor.trajectory.guidance == 1
    activations, image = extractor.generate((12, 20))
    assert image.shape == (1, 3, 12, 20)
    assert activations.keys() == extractor(torch.zeros(1, 3, 12, 20)).keys()
    pipe = DDPMPipeline.from_pretrained(tiny_pixel_pipeline)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(5)
    x_t = seeded_noise((1, 3, 12, 20), 3, 'noise', 0)
    given = {}
    for t in scheduler.timesteps:
        given[int(t)] = x_t
        with torch.no_grad():
            epsilon = pipe.unet(x_t, t).sample[:, :3]  # what is behind it is the variance
        x_t = scheduler.step(epsilon, t, x_t).prev_sample
    torch.testing.assert_close(image, x_t, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(decode(None, image), x_t.clamp(-1, 1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(activations['unet-in'][:, 0], given[200], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(activations['unet-in'][:, 1], given[600], rtol=1e-3, atol=1e-4)


def test_half_precision_and_options_of_speed(make, images):
    expected = make()(images)
    for options in (
        {'dtype': 'bfloat16'},
        {'memory_format': 'channels_last', 'attention': 'eager', 'gradient_checkpointing': True},
    ):
        for name, x in make(**options)(images).items():
            assert (x.float() - expected[name]).norm() < 0.1 * expected[name].norm(), name


def test_gradients_reach_the_image(make, images):
    extractor, images = make(), images.requires_grad_()
    extractor(images)['mid-vit-out'].sum().backward()
    assert images.grad.abs().sum() > 0


def test_the_full_size_model_can_be_counted_without_weights():
    """DIFT's setting for semantic correspondence, and DDPM-seg's 8448 channels."""
    with torch.device('meta'):
        dift = DiffusionExtractor('adm-imagenet-256', ['dift-4'], [101], ensemble=2, weights={'random': ['unet']})
        found = dift(torch.empty(1, 3, 480, 512))
        blocks = [f'adm-{i}' for i in (5, 6, 7, 8, 12)]
        ddpm = DiffusionExtractor('ddpm-lsun-horse', blocks, [50, 150, 250], weights={'random': ['unet', 'vae']})
    assert {name: tuple(x.shape) for name, x in found.items()} == {'up-level1-repeat1-vit-out': (1, 1, 1024, 30, 32)}
    assert 3 * sum(ddpm.channels) == 8448
    assert [site.stride for site in ddpm.sites.values()] == [8, 8, 8, 4, 2]

"""Transformers behind the extractor, held against diffusers' own pipelines."""

import inspect

import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch.nn import functional as F

from diffseg.diffusion.conditioning import Conditioning
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.latents import decode, latent_space
from diffseg.diffusion.loading import load_parts, load_vae
from diffseg.diffusion.network_call import NetworkCall
from diffseg.diffusion.recorder import ActivationRecorder

SIZE = 64, 96
UNGUIDED = {'guidance_scale': 1.0}
OPTIONS = {
    'flux': {'guidance_scale': 3.5},
    'flux2': {'guidance_scale': 4.0},
    'qwen-image': {},
    'hunyuan-dit': {**UNGUIDED, 'original_size': SIZE},
    'z-image': {'guidance_scale': 0.0},
}
FIELDS = {  # arguments of transformers that hold prompts, and the fields of `Conditioning`
    'encoder_hidden_states': 'embeds',
    'pooled_projections': 'pooled',
    'encoder_attention_mask': 'mask',
    'encoder_hidden_states_mask': 'mask',
    'text_embedding_mask': 'mask',
    'encoder_hidden_states_t5': 'embeds_2',
    'text_embedding_mask_t5': 'mask_2',
    'class_labels': 'labels',
}
EULER = ('sd3', 'sd35-medium', 'flux', 'flux2', 'qwen-image', 'auraflow', 'lumina2')
BLOCK = {'lumina2': 'vit-block1-out', 'z-image': 'vit-block1-out'}


class Calls(list):
    """The arguments of each call of a transformer, by name."""

    def __init__(self, network):
        super().__init__()
        self.names = list(inspect.signature(network.forward).parameters)
        self.handle = network.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, network, args, kwargs):
        call = dict(zip(self.names, args, strict=False)) | kwargs
        self.append({name: x for name, x in call.items() if x is not None})


def conditioning_of(call: dict) -> Conditioning:
    """The prompt of a pipeline's call of its transformer."""
    tensors = {FIELDS[name]: x for name, x in call.items() if name in FIELDS}
    if 'cap_feats' in call:
        tensors['embeds'] = torch.stack(call['cap_feats'])
    if 'labels' in tensors:
        tensors['embeds'] = torch.empty(len(tensors['labels']), 0, 0)
    return Conditioning(**tensors)


def equal(ours, theirs) -> None:
    """Raise unless two arguments are equal, tensors in lists and mappings as well; types of numbers may differ."""
    if isinstance(theirs, dict):
        for name, x in theirs.items():
            equal(ours[name], x)
    elif isinstance(theirs, torch.Tensor):
        ours, theirs = torch.broadcast_tensors(ours, theirs)  # one guidance for all, ids with and without a batch
        torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-6, rtol=1e-6)
    elif isinstance(theirs, list | tuple) and theirs and isinstance(theirs[0], torch.Tensor | list | tuple):
        for a, b in zip(ours, theirs, strict=True):
            equal(a, b)
    elif theirs is not None:
        assert ours == theirs


def unpacked(tokens: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) of tokens (B, N, 4 C) for `SIZE`."""
    grid = SIZE[0] // 16, SIZE[1] // 16
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), 2)


@pytest.mark.parametrize('kind', tiny_pipelines.KINDS)
def test_called_as_by_the_pipeline(kind, pipeline_folder):
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder(kind))
    network = pipeline.transformer
    calls = Calls(network)
    size = {} if kind == 'dit' else dict(zip(('height', 'width'), SIZE, strict=True))
    tiny_pipelines.generate(pipeline, **size, **OPTIONS.get(kind, UNGUIDED))
    (first, *_), indices = list(calls), pipeline.scheduler.timesteps
    calls.clear()

    packed = first['hidden_states'].ndim == 3 if 'hidden_states' in first else False
    latent = first['x'] if 'x' in first else first['hidden_states']
    if isinstance(latent, list):
        latent = torch.stack(latent)[:, :, 0]
    x_t = unpacked(latent) if packed else latent
    recorder = ActivationRecorder(network, ['transformer-out'])
    call = NetworkCall(network)
    with torch.no_grad():
        prompt = conditioning_of(first).rows([0] * len(x_t))
        call(recorder, x_t, indices[:1].expand(len(x_t)), prompt)
    ours = calls[0]
    ignored = {'return_dict', 'joint_attention_kwargs', 'attention_kwargs'}
    for name in (first.keys() | ours.keys()) - ignored - {'patch_size', 'f_patch_size'}:
        assert name in ours and name in first, name
        equal(ours[name], first[name])


@pytest.mark.parametrize('kind', EULER)
def test_generates_what_the_pipeline_does(kind, pipeline_folder, monkeypatch):
    folder = pipeline_folder(kind)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    calls = Calls(pipeline.transformer)
    theirs = tiny_pipelines.generate(pipeline, 3, *SIZE, **OPTIONS.get(kind, UNGUIDED))
    noise, mu = calls[0]['hidden_states'], {}
    if noise.ndim == 3:
        noise, theirs = unpacked(noise), unpacked(theirs)
    if pipeline.scheduler.config.use_dynamic_shifting:
        config = pipeline.scheduler.config
        names = ('base_image_seq_len', 'max_image_seq_len', 'base_shift', 'max_shift')
        mu = {'mu': calculate_shift(24, *(config[name] for name in names))}
        if kind == 'flux2':
            mu = {'mu': _flux2_shift(24, 3)}
    trajectory = {'type': 'generation', 'steps': 3, 'guidance': 1, **mu}
    prompt = conditioning_of(calls[0])
    layers = [BLOCK.get(kind, 'vit-block0-out')]
    extractor = DiffusionExtractor(folder, layers, [1000], trajectory=trajectory, prompt=prompt)
    monkeypatch.setattr(extractor, '_draw', lambda *args: noise)
    with torch.no_grad():
        activations, ours = extractor.generate(SIZE)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    (x,) = activations.values()
    assert x.shape[:2] == (1, 1) and x.shape[-2:] == (4, 6)


def test_guidance_is_the_pipelines_unless_it_is_set(pipeline_folder):
    def guidance(kind: str, **options) -> tuple[float, float | None]:
        extractor = DiffusionExtractor(
            pipeline_folder(kind), ['transformer-out'], [1000], prompt='a horse', trajectory='generation', **options
        )
        return extractor.trajectory.guidance, extractor.fingerprint.get('embedded_guidance')

    assert guidance('sd3') == (7.0, None)
    assert guidance('flux') == (1.0, 3.5) and guidance('flux', embedded_guidance=2) == (1.0, 2.0)
    with pytest.raises(ValueError, match=r'embedded_guidance is 2\.0, but a SD3Transformer2DModel .* takes none'):
        guidance('sd3', embedded_guidance=2.0)


def _flux2_shift(tokens: int, steps: int) -> float:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return compute_empirical_mu(tokens, steps)


@pytest.mark.parametrize('kind', tiny_pipelines.KINDS)
def test_latents_are_scaled_and_decoded_as_by_the_pipeline(kind, pipeline_folder):
    folder = pipeline_folder(kind)
    parts, vae = load_parts(folder), load_vae(folder)
    space = latent_space(parts.vae_config)
    side = 2 * parts.vae_scale_factor
    images = torch.rand(2, 3, side, 2 * side) * 2 - 1
    extractor = DiffusionExtractor(
        folder, ['transformer-out'], [100], trajectory='clean', prompt=None, vae_sample='mode'
    )
    with torch.no_grad():
        latents = extractor.encode(images)
        mean = space.encode(vae, images).mean
        decoded = decode(vae, latents)
        expected = space.decode(vae, mean).clamp(-1, 1)
    assert latents.shape[1] == parts.latent_channels
    assert not torch.allclose(latents, mean)
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=1e-4)


def test_draws_are_averaged_before_the_norm(pipeline_folder):
    """The modulation is a line for each channel, known from a single draw; the norm is of the mean of raw features."""
    folder, prompt = pipeline_folder('flux'), Conditioning(torch.randn(1, 5, 32), torch.randn(1, 32))
    latents = torch.randn(2, 3, 16, 8, 12)  # (B, E, C, h, w)

    def extract(layer: str, latents: torch.Tensor, **options) -> torch.Tensor:
        extractor = DiffusionExtractor(
            folder, [layer], [0.26, 0.5], trajectory='clean', prompt=prompt, ensemble=latents.shape[1], **options
        )
        with torch.no_grad():
            return extractor.extract_latents(latents)[layer].double().flatten(3)  # (B, T, C, h*w)

    def normalised(raw: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(raw.transpose(2, 3), raw.shape[2:3], eps=1e-6).transpose(2, 3)

    for block in ('vit-block1', 'vit-block2'):  # a double and a single one
        single = normalised(extract(f'{block}-in', latents[:, :1]))
        modulated = extract(f'{block}-mod', latents[:, :1])
        centred = single - single.mean(3, keepdim=True)
        slope = (centred * modulated).sum(3, keepdim=True) / centred.square().sum(3, keepdim=True)
        shift = modulated.mean(3, keepdim=True) - slope * single.mean(3, keepdim=True)
        torch.testing.assert_close(slope * single + shift, modulated, atol=1e-4, rtol=1e-4)

        ours = extract(f'{block}-mod', latents, average_draws=True)
        expected = slope * normalised(extract(f'{block}-in', latents)) + shift
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        assert (extract(f'{block}-mod', latents) - ours).abs().max() > 0.01
        raw = normalised(extract(f'{block}-in', latents).index_fill(2, torch.tensor([3]), 0))
        discarded = extract(f'{block}-mod', latents, average_draws=True, discard=[3])
        torch.testing.assert_close(discarded, slope * raw + shift, atol=1e-4, rtol=1e-4)


def test_draws_are_averaged_in_one_call(pipeline_folder):
    prompt = Conditioning(torch.randn(1, 5, 32), torch.randn(1, 32))
    options = dict(trajectory='clean', prompt=prompt, ensemble=3, average_draws=True)
    with pytest.raises(ValueError, match='average_draws is set, but no modulated features are read'):
        DiffusionExtractor(pipeline_folder('flux'), ['vit-block1-in'], [260], **options)
    extractor = DiffusionExtractor(
        pipeline_folder('flux'), ['vit-block1-mod'], [260], **options, runtime={'micro_batch': 2}
    )
    with pytest.raises(ValueError, match='micro_batch is 2, but average_draws needs all draws of a batch in one call'):
        extractor.extract_latents(torch.randn(1, 16, 8, 12))
    assert extractor.fingerprint['average_draws'] is True

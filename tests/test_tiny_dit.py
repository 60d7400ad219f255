"""The transformer of the demo is what its card says."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PixArtSigmaPipeline, PixArtTransformer2DModel, StableDiffusionPipeline
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from quadrupeds import caption

import diffseg  # noqa: F401  registers its parts
from diffseg.datasets.toy import SPECIES
from diffseg.diffusion.sites import sites

DEMO = Path(__file__).parents[1] / 'demo'
FOLDER = DEMO / 'tiny-dit'
CONFIGS = sorted((DEMO.parent / 'configs/tiny-dit').glob('[!_]*.py'))


@pytest.fixture(scope='module')
def pipeline():
    pipeline = PixArtSigmaPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_is_an_ordinary_small_pipeline(pipeline):
    files = [path for path in FOLDER.rglob('*') if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10e6
    assert not [path for path in files if path.suffix in ('.bin', '.pt', '.pth', '.ckpt')]
    names = [f'vit-block{block}-{end}' for block in range(6) for end in ('in', 'mod', 'self-q', 'cross-q', 'out')]
    assert set(names) <= set(sites(pipeline.transformer))
    theirs = AutoencoderKL.from_pretrained(DEMO / 'tiny-sd', subfolder='vae').state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in pipeline.vae.state_dict().items())


def test_padded_prompts_predict_what_unpadded_ones_do(pipeline):
    x_t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def predict(length, masked=True):
        states, mask, *_ = pipeline.encode_prompt('a photo of a dog', False, max_sequence_length=length)
        conditions = {'encoder_hidden_states': states, 'encoder_attention_mask': mask if masked else None}
        return pipeline.transformer(x_t, **conditions, timestep=torch.tensor([700.0])).sample

    torch.testing.assert_close(predict(300), predict(8))
    assert not torch.allclose(predict(300, masked=False), predict(8), atol=0.05)


def test_it_generates_the_animals_of_its_prompts(pipeline):
    prompts = [caption(species) for species in SPECIES for _ in range(6)]
    torch.manual_seed(0)
    random = PixArtTransformer2DModel.from_config(pipeline.transformer.config).eval()
    counts = []
    for transformer, steps in ((pipeline.transformer, 8), (random, 2)):
        generate = PixArtSigmaPipeline(**{**pipeline.components, 'transformer': transformer})
        generate.set_progress_bar_config(disable=True)
        latents = generate(
            prompts, num_inference_steps=steps, guidance_scale=5.0, generator=torch.Generator().manual_seed(0),
            max_sequence_length=8, use_resolution_binning=False, output_type='latent',
        ).images  # fmt: skip
        counts.append(int((species_of(latents) == torch.arange(24) // 6).sum()))
    assert counts[0] >= 16 and counts[1] <= 12  # of 24; by chance, six


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_configs_of_the_study(path):
    cfg = Config.fromfile(path, import_custom_modules=False)
    backbone = cfg.model.backbone
    assert Path(backbone.model).resolve() == FOLDER
    assert ('random' in path.stem) == (backbone.get('random') == ['transformer'])
    assert ('discard' in path.stem) == ('discard' in backbone)
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model).eval()
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        if 'fcn' in path.stem:
            assert model.encode_decode(images, [{'img_shape': (64, 64)}]).shape == (1, 8, 64, 64)
        else:
            descriptors = model.encode(images, [None])
            assert descriptors.shape == (1, 192 * len(backbone.layers), 8, 8) and descriptors.std() > 0


def test_all_configs_are_seen():
    assert len(CONFIGS) == 7


@torch.no_grad()
def species_of(latents: torch.Tensor) -> torch.Tensor:
    """Which caption lets `tiny-sd` denoise latents (N, 4, h, w) best; 94 % of drawn pictures are recognised so."""
    judge = StableDiffusionPipeline.from_pretrained(DEMO / 'tiny-sd').to(torch.float32)
    captions = [caption(species) for species in SPECIES]
    states, _ = judge.encode_prompt(captions, 'cpu', 1, False)
    errors = torch.zeros(len(SPECIES), len(latents))
    for timestep in (500, 700):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(timestep))
        x_t = judge.scheduler.add_noise(latents, noise, torch.tensor([timestep]))
        for number, state in enumerate(states):
            predicted = judge.unet(x_t, timestep, state.expand(len(latents), -1, -1)).sample
            errors[number] += (predicted - noise).square().mean(dim=(1, 2, 3))
    return errors.argmin(dim=0)

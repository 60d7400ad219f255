"""The extractor on an accelerator: no tensor strays to the host, and no call waits for the device."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import ControlNetModel
from fake_device import HostWaitsError, fake_device, on_device
from torch._subclasses.fake_tensor import DataDependentOutputException

from diffseg.diffusion.conditioning import Conditioning
from diffseg.diffusion.extractor import DiffusionExtractor, Prompts
from diffseg.diffusion.options import group_options

LAYERS = ['up-level1-repeat0-vit-block0-cross-q', 'dift-1']
GENERATION = {'type': 'generation', 'steps': 4}
OPTIONS = {
    'noise, of members in micro-batches': {'ensemble': 3, 'micro_batch': 2, 'dtype': 'bfloat16'},
    'fresh noise, and attention': {
        'noise': 'random',
        'vae_sample': 'mode',
        'attention_maps': ['up_cross', 'down_self'],
    },
    'clean, and prompts of the call': {'trajectory': 'clean', 'timesteps': [261], 'prompt': None},
    'inversion': {'trajectory': {'type': 'inversion', 'steps': 4}, 'timesteps': [-1, 250]},
    'generation': {'trajectory': GENERATION, 'timesteps': [501, 751], 'prompt': 'a horse', 'ensemble': 2},
    'refinement, and averaged attention': {
        'trajectory': 'refinement',
        'timesteps': [1],
        'attention_maps': ['up_cross'],
        'attention_mode': 'average',
        'memory_format': 'channels_last',
    },
}


@pytest.fixture(scope='module')
def shallow_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `shallow_sd15`, of SDXL's kind."""
    folder = tiny.save_sdxl(tmp_path_factory.mktemp('models') / 'shallow-sdxl')
    options = {**tiny.SHALLOW, 'transformer_layers_per_block': (2, 1), 'attention_head_dim': (4, 8)}
    tiny.sdxl_unet(**options).save_pretrained(folder / 'unet')
    return folder


@pytest.fixture
def make(shallow_sd15: Path) -> Callable[..., DiffusionExtractor]:
    def make(model: Path = shallow_sd15, layers: list[str] = LAYERS, **options) -> DiffusionExtractor:
        options = group_options({'timesteps': [50, 400], 'check_finite': False, **options})
        return DiffusionExtractor(model, layers, **options)

    return make


def assert_on_device(
    extractor: DiffusionExtractor, prompts: Prompts | None = None, size: tuple[int, int] = (64, 70)
) -> None:
    with fake_device(extractor) as to_device:
        activations = extractor(to_device(torch.zeros(2, 3, *size)), prompts)
    assert on_device(activations)
    assert [x.shape[0] for x in activations.values()] == [2] * len(extractor.layers)


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_every_way_of_extraction(make, options):
    extractor = make(**options)
    assert_on_device(extractor, None if extractor.conditioning else extractor.prompt_encoder(['a dog', 'a horse']))


def test_sdxl(make, shallow_sdxl):
    options = {'trajectory': GENERATION, 'timesteps': [751], 'prompt': ['a horse', 'a dog']}
    assert_on_device(make(shallow_sdxl, **options), ['a dog', 'a horse'])


@pytest.mark.parametrize(
    'options', [{'ensemble': 2}, {'trajectory': GENERATION, 'timesteps': [500]}], ids=['noise', 'generation']
)
def test_pixel_space(make, tiny_pixel_pipeline, options):
    assert_on_device(make(tiny_pixel_pipeline, ['adm-0', 'mid-vit-out'], **options), size=(12, 20))


def test_a_controlnet_that_sees_the_image(make, tmp_path):
    ControlNetModel.from_unet(
        tiny.unet(**tiny.SHALLOW), conditioning_embedding_out_channels=(4, 8, 8, 8)
    ).save_pretrained(tmp_path)
    net = {'model': str(tmp_path), 'image': 'image'}
    assert_on_device(make(controlnet=[net, net], trajectory=GENERATION, timesteps=[751], prompt='a horse'))


@pytest.mark.parametrize('pooled', [False, True])
def test_embeddings_of_the_device(make, shallow_sd15, shallow_sdxl, pooled):
    extractor = make(shallow_sdxl if pooled else shallow_sd15, prompt=None)
    with fake_device(extractor) as to_device:
        width = extractor.network.config.cross_attention_dim
        embeds, given = torch.zeros(2, 5, width), torch.zeros(2, 32) if pooled else None
        conditioning = Conditioning(to_device(embeds), None if given is None else to_device(given))
        assert on_device(extractor(to_device(torch.zeros(2, 3, 64, 64)), conditioning))


def test_encoding_latents_and_generating(make):
    extractor = make(trajectory={'type': 'generation', 'steps': 2}, timesteps=[1], prompt='a horse')
    with fake_device(extractor) as to_device:
        images = to_device(torch.zeros(2, 3, 64, 64))
        assert on_device([extractor.encode(images), extractor.extract_latents(to_device(torch.zeros(2, 4, 8, 8)))])
        assert on_device(extractor.generate((64, 128)))


def test_the_check_of_values_is_the_only_wait(make):
    extractor = make(check_finite=True)
    with fake_device(extractor) as to_device, pytest.raises((HostWaitsError, DataDependentOutputException)):
        extractor(to_device(torch.zeros(1, 3, 64, 64)))

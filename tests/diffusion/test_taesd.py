"""Tiny autoencoders in place of a model's VAE."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.images import read_image
from diffseg.diffusion.latents import decode, latent_space
from diffseg.diffusion.loading import load_parts, load_vae

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / 'shared/data/real/taesd'
PICTURES = ROOT.parent / 'shared/data/SPair-71k-mini/JPEGImages'
LAYERS = ['up-level1-repeat0-res-out']


def save_published(vae: AutoencoderTiny, folder: Path, name: str = 'taesd', suffix: str = '.safetensors') -> Path:
    """Write the two files of TAESD's repository; returns the encoder's."""
    folder.mkdir(exist_ok=True)
    paths = []
    for part, offset in (('encoder', 0), ('decoder', 1)):
        state = {}
        for key, x in getattr(vae, part).layers.state_dict().items():
            k, rest = key.split('.', 1)
            state[f'{int(k) + offset}.{rest}'] = x
        paths.append(folder / f'{name}_{part}{suffix}')
        save = save_file if suffix == '.safetensors' else torch.save
        save(state, paths[-1])
    return paths[0]


@pytest.fixture
def make(tiny_pipeline: Path) -> Callable[..., DiffusionExtractor]:
    def make(vae: Path | None = None, random=(), **options) -> DiffusionExtractor:
        weights = {'vae': vae, 'random': random}
        return DiffusionExtractor(tiny_pipeline, LAYERS, [51], weights=weights, **options)

    return make


def public(config: Mapping) -> dict:
    """A configuration as it is in keys of caches."""
    return json.loads(json.dumps({key: value for key, value in config.items() if key[0] != '_'}))


def images(n: int = 2, height: int = 64, width: int = 128) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_latents_are_those_of_diffusers_and_come_scaled(make, tiny_taesd):
    extractor = make(tiny_taesd)
    with torch.no_grad():
        expected = tiny.taesd(seed=7).encode(images()).latents
    torch.testing.assert_close(extractor.encode(images()), expected)
    assert isinstance(extractor.vae, AutoencoderTiny) and not extractor.vae.training
    assert not any(x.requires_grad for x in extractor.vae.parameters())
    assert not hasattr(extractor.vae.decoder, 'layers')
    assert extractor(images())[LAYERS[0]].shape == make()(images())[LAYERS[0]].shape


@pytest.mark.parametrize('options', [{'vae_slicing': True}, {'vae_tiling': True}])
def test_encoded_one_by_one_and_in_tiles(make, tiny_taesd, options):
    extractor, x = make(tiny_taesd, runtime=options), images(2, 64, 576)
    torch.testing.assert_close(extractor.encode(x)[..., :40], make(tiny_taesd).encode(x)[..., :40])


def test_every_form_has_the_same_weights(tiny_pipeline, tmp_path):
    vae = tiny.taesd(latent_channels=4)
    vae.save_pretrained(tmp_path / 'diffusers')
    shutil.copy(tmp_path / 'diffusers/diffusion_pytorch_model.safetensors', tmp_path / 'alone.safetensors')
    file = save_published(vae, tmp_path / 'published')
    save_published(vae, tmp_path / 'pickled', suffix='.pth')
    places = [tmp_path / 'diffusers', tmp_path / 'alone.safetensors', file, file.parent, tmp_path / 'pickled']
    expected = load_parts(tiny_pipeline, vae=places[0])
    assert expected.fingerprint != load_parts(tiny_pipeline).fingerprint
    for place in places:
        parts = load_parts(tiny_pipeline, vae=place)
        assert parts.fingerprint == expected.fingerprint
        assert public(parts.vae_config) == public(expected.vae_config)
        whole = load_vae(tiny_pipeline, vae=str(place)).state_dict()
        assert whole.keys() == vae.state_dict().keys()
        assert all(torch.equal(whole[key], x) for key, x in vae.state_dict().items())


def test_a_model_may_have_one_itself(tiny_pipeline, tiny_taesd, tmp_path):
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / 'model'))
    shutil.rmtree(folder / 'vae')
    shutil.copytree(tiny_taesd, folder / 'vae')
    assert load_parts(folder).fingerprint == load_parts(tiny_pipeline, vae=tiny_taesd).fingerprint


def test_dtype_and_random_weights(make, tiny_taesd, tmp_path):
    assert make(tiny_taesd, dtype='bfloat16').vae.dtype == torch.bfloat16
    a, b = make(tiny_taesd, random=['vae']), make('madebyollin/taesd', random=['vae'])
    assert a.vae.config.encoder_block_out_channels == [8, 8, 8, 8] and a.fingerprint != make(tiny_taesd).fingerprint
    assert b.vae.config.encoder_block_out_channels == (64, 64, 64, 64)
    with torch.device('meta'):
        weights = {'vae': 'any/vae', 'random': ['unet', 'vae']}
        meta = DiffusionExtractor('sd15', LAYERS, [51], weights=weights, prompt=torch.zeros(1, 77, 768))
        assert meta(torch.empty(1, 3, 512, 512))[LAYERS[0]].shape == (1, 1, 1280, 16, 16)


def test_what_does_not_fit(make, tiny_taesd, tmp_path):
    tiny.taesd(latent_channels=16, encoder_block_out_channels=(8, 8, 8, 8)).save_pretrained(tmp_path / '16')
    with pytest.raises(ValueError, match=r'has 16 latent channels and 8 .*; .* needs 4 latent channels and 8 image'):
        make(tmp_path / '16')
    three = {f'{part}_block_out_channels': (8, 8, 8) for part in ('encoder', 'decoder')}
    blocks = {'num_encoder_blocks': (1, 1, 1), 'num_decoder_blocks': (1, 1, 1)}
    tiny.taesd(**three, **blocks).save_pretrained(tmp_path / '4')
    with pytest.raises(ValueError, match=r'and 4 image pixels per latent cell; .* needs 4 latent channels and 8'):
        make(tmp_path / '4')
    with pytest.raises(ValueError, match='works on pixels, without VAE; leave out vae='):
        load_parts('ddpm-lsun-horse', random=['unet'], vae=tiny_taesd)
    with pytest.raises(ValueError, match='scale_latent=False needs the VAE of the model'):
        make(tiny_taesd, scale_latent=False)


def test_a_vae_of_another_kind_is_not_replaced(pipeline_folder, tiny_taesd):
    with pytest.raises(ValueError, match=r'is of class AutoencoderDC; an AutoencoderTiny replaces only AutoencoderKL'):
        load_parts(pipeline_folder('sana'), vae=tiny_taesd)


def test_wrong_sources(make, tiny_pipeline, tiny_taesd, tmp_path):
    with pytest.raises(ValueError, match=r'vae is of class AutoencoderKL, not an AutoencoderTiny'):
        make(tiny_pipeline / 'vae')
    with pytest.raises(FileNotFoundError, match=r'no AutoencoderTiny at .*none.safetensors; give a hub id'):
        make(tmp_path / 'none.safetensors')
    with pytest.raises(
        FileNotFoundError, match=r'holds no AutoencoderTiny: expected config.json.*it holds: model_index'
    ):
        make(tiny_pipeline)
    file = save_published(tiny.taesd(latent_channels=4), tmp_path / 'files')
    with pytest.raises(
        ValueError, match=r'taesd_decoder.safetensors is not the encoder .*give the file of the encoder'
    ):
        make(file.with_name('taesd_decoder.safetensors'))
    file.with_name('taesd_decoder.safetensors').unlink()
    make(file)  # which is all that is needed to encode
    with pytest.raises(FileNotFoundError, match=r'no decoder beside .*; to generate images, put taesd_decoder'):
        load_vae(tiny_pipeline, vae=file)
    save_published(tiny.taesd(latent_channels=4), file.parent, 'taesdxl')
    with pytest.raises(ValueError, match=r'several encoders: taesd_encoder.safetensors, taesdxl_encoder.safetensors'):
        make(file.parent)
    state = load_file(file)
    del state['3.conv.0.weight']
    save_file(state, file)
    with pytest.raises(ValueError, match=r'do not fit the vae .*1 tensors are missing'):
        make(file)
    broken = Path(shutil.copytree(tiny_taesd, tmp_path / 'broken'))
    (broken / 'diffusion_pytorch_model.safetensors').unlink()
    with pytest.raises(OSError, match=r'cannot read the AutoencoderTiny .*broken: .*Without network, give a folder'):
        make(broken)


def pictures(n: int = 4) -> torch.Tensor:
    paths = sorted(PICTURES.glob('*/*.jpg'))[:n]
    if not paths or not REAL.is_dir():
        pytest.skip('no real pictures and weights in ../shared/data')
    return torch.stack([read_image(path, (128, 192)) for path in paths])


def test_real_weights_reconstruct_photographs(tmp_path):
    x = pictures()
    vae = load_vae('sd15', vae=REAL)
    with torch.no_grad():
        latents = latent_space(vae).encode(vae, x).mean
        psnr = -10 * ((decode(vae, latents) - x) / 2).square().mean((1, 2, 3)).log10()
    assert psnr.min() > 16 and psnr.mean() > 20
    assert 0.5 < latents.std() < 1.5  # as the UNet expects them


def test_real_weights_in_both_names(tiny_pipeline, tmp_path):
    x = pictures(2)
    load_vae(tiny_pipeline, vae=REAL).save_pretrained(tmp_path / 'diffusers')
    published, diffusers = (
        DiffusionExtractor(tiny_pipeline, LAYERS, [51], weights={'vae': place})
        for place in (REAL, tmp_path / 'diffusers')
    )
    assert published.fingerprint == diffusers.fingerprint
    assert torch.equal(published.encode(x), diffusers.encode(x))
    stock = AutoencoderTiny.from_pretrained(tmp_path / 'diffusers')
    with torch.no_grad():
        assert torch.equal(stock.encode(x).latents, published.encode(x))

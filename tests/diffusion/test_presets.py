import pytest

from diffseg.diffusion.loading import load_config, meta_network
from diffseg.diffusion.presets import PRESETS, get_preset, preset_of_repo

NAMES = [
    'sd15',
    'sd21',
    'sd21-base',
    'sdxl',
    'playground-v2',
    'sd-turbo',
    'sdxl-turbo',
    'cleandift-sd15',
    'cleandift-sd21',
    'adm-imagenet-256',
    'ddpm-lsun-bedroom',
    'ddpm-lsun-cat',
    'ddpm-lsun-horse',
    'ddpm-ffhq',
]
PIXELS = {name for name in NAMES if name.startswith(('adm-', 'ddpm-'))}
# millions of parameters, as published
SIZES = {'sd15': 859.5, 'cleandift-sd15': 859.5, 'sdxl': 2567.5, 'playground-v2': 2567.5, 'sdxl-turbo': 2567.5}
SIZES |= dict.fromkeys(PIXELS, 552.8)


@pytest.mark.parametrize('name', NAMES)
def test_architecture_is_known_without_weights(name):
    unet = meta_network(name)
    assert all(parameter.is_meta for parameter in unet.parameters())
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(SIZES.get(name, 865.9), abs=0.05)
    dims = {859.5: 768, 865.9: 1024, 2567.5: 2048, 552.8: None}
    assert unet.config.get('cross_attention_dim') == dims[SIZES.get(name, 865.9)]


@pytest.mark.parametrize('preset', PRESETS.values(), ids=PRESETS)
def test_a_preset_agrees_with_itself(preset):
    configs = load_config(preset.name)
    unet, vae, scheduler = configs
    assert configs.pixel_space == (vae is None) == (preset.name in PIXELS) == (preset.repo_id is None)
    assert unet['sample_size'] * (1 if vae is None else 8) == preset.image_size
    assert (preset.checkpoint is None) == (preset.repo_id is not None)
    if vae is not None:
        assert len(vae['block_out_channels']) == 4
        assert vae['force_upcast'] == (vae['scaling_factor'] == 0.13025) == (unet['addition_embed_type'] == 'text_time')
    assert scheduler['prediction_type'] == ('v_prediction' if preset.image_size == 768 else 'epsilon')
    assert preset.repo_id not in preset.gone and set(preset.gone) <= set(preset.mirrors)
    assert (preset.network_weights is None) == (preset.clean_timestep is None)


@pytest.mark.parametrize('name', NAMES)
def test_samplers_take_the_timesteps_of_the_repositories(name):
    """As their scheduler/scheduler_config.json say; guided-diffusion counts from 0."""
    scheduler = load_config(name).scheduler
    expected = ('trailing', 1) if 'turbo' in name else ('leading', 0 if name in PIXELS else 1)
    assert (scheduler.get('timestep_spacing', 'leading'), scheduler.get('steps_offset', 0)) == expected


def test_all_presets_are_there():
    assert list(PRESETS) == NAMES
    assert all(get_preset(name).name == name for name in NAMES)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(KeyError, match=r'did you mean.*sdxl'):
        get_preset('sdx1')


def test_hub_ids_are_recognised_under_all_their_names():
    assert preset_of_repo('stabilityai/stable-diffusion-2-1') is PRESETS['sd21']
    assert preset_of_repo('Manojb/stable-diffusion-2-1-base') is PRESETS['sd21-base']
    assert preset_of_repo('stable-diffusion-v1-5/stable-diffusion-v1-5') is PRESETS['sd15']  # not CleanDIFT
    assert preset_of_repo('somebody/else') is None

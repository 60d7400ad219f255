import math

import pytest

from diffseg.diffusion.latents import latent_space
from diffseg.diffusion.loading import SINGLE_FILE_PRESETS, find_source, load_config, meta_network
from diffseg.diffusion.pipeline_prompts import ENCODINGS, find_pipeline
from diffseg.diffusion.presets import PRESETS, get_preset, preset_of_repo
from diffseg.diffusion.schedules import FlowSchedule, build_schedule
from diffseg.diffusion.sites import kind_of
from diffseg.inspection import available_sites

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
    'sd3-medium',
    'sd35-medium',
    'sd35-large',
    'flux-dev',
    'flux-schnell',
    'pixart-sigma',
    'pixart-alpha',
    'sana-1.6b',
    'hunyuan-dit',
    'dit-xl-2-256',
    'dit-xl-2-512',
]
TRANSFORMERS = NAMES[NAMES.index('sd3-medium') :]
UNETS = NAMES[: -len(TRANSFORMERS)]
PIXELS = {name for name in NAMES if name.startswith(('adm-', 'ddpm-'))}
# millions of parameters, as published
SIZES = {'sd15': 859.5, 'cleandift-sd15': 859.5, 'sdxl': 2567.5, 'playground-v2': 2567.5, 'sdxl-turbo': 2567.5}
SIZES |= dict.fromkeys(PIXELS, 552.8)
# billions of values in the published files, as their names, cards and papers say
BILLIONS = {
    'sd3-medium': '2.1',
    'sd35-medium': '2.5',
    'sd35-large': '8.1',
    'flux-dev': '11.9',
    'flux-schnell': '11.9',
    'pixart-sigma': '0.6',
    'pixart-alpha': '0.6',
    'sana-1.6b': '1.6',
    'hunyuan-dit': '1.5',
    'dit-xl-2-256': '0.7',  # 0.675 in the paper
    'dit-xl-2-512': '0.7',
}


@pytest.mark.parametrize('name', UNETS)
def test_architecture_is_known_without_weights(name):
    unet = meta_network(name)
    assert all(parameter.is_meta for parameter in unet.parameters())
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(SIZES.get(name, 865.9), abs=0.05)
    dims = {859.5: 768, 865.9: 1024, 2567.5: 2048, 552.8: None}
    assert unet.config.get('cross_attention_dim') == dims[SIZES.get(name, 865.9)]


@pytest.mark.parametrize('name', TRANSFORMERS)
def test_transformers_have_the_published_size(name):
    """Tables of positions (SD3) are counted with the weights, as in the files.

    In diffusers, each block of DiT has embeddings of the timestep and the class, which are one in the published model.
    """
    transformer = meta_network(name)
    assert all(parameter.is_meta for parameter in transformer.parameters())
    tensors = transformer.state_dict()
    if name.startswith('dit'):
        tensors = {k: x for k, x in tensors.items() if '.emb.' not in k or k.startswith('transformer_blocks.0.')}
        assert sum(x.numel() for x in tensors.values()) / 1e6 == pytest.approx(675, abs=0.3)
    assert f'{sum(x.numel() for x in tensors.values()) / 1e9:.1f}' == BILLIONS[name]


@pytest.mark.parametrize('name', TRANSFORMERS)
def test_a_transformers_parts_fit_each_other(name):
    preset, configs = PRESETS[name], load_config(name)
    space = latent_space(configs.vae)
    transformer = meta_network(name)
    kind = kind_of(transformer)
    channels = space.channels(configs.vae)
    assert transformer.config.in_channels == channels * (kind.patch_size(transformer) ** 2 if kind.packed else 1)
    assert available_sites(name)[1] == (preset.image_size,) * 2
    assert not kind.packed or 'sample_size' not in configs.network
    flow = name.startswith(('sd3', 'flux', 'sana'))
    schedule = build_schedule(configs.scheduler, name)
    assert isinstance(schedule, FlowSchedule) == flow
    assert schedule.prediction_type == ('flow' if flow else 'v_prediction' if name == 'hunyuan-dit' else 'epsilon')
    if preset.pipeline is None:
        assert 'num_embeds_ada_norm' in configs.network  # reads labels
    else:
        assert ENCODINGS[preset.pipeline].network == type(transformer).__name__
        assert find_pipeline(find_source(name)) == find_pipeline(find_source(preset.repo_id)) == preset.pipeline
    assert preset.gated == name.startswith(('sd3', 'flux-dev'))


@pytest.mark.parametrize(
    ('name', 'shift'), [('flux-dev', math.exp(1.15)), ('flux-schnell', 1), ('sana-1.6b', 3), ('sd35-large', 3)]
)
def test_steps_of_rectified_flow_are_shifted(name, shift):
    """SD3, 2403.03206, equation 23; Flux-dev's shift is that of 1024 pixels."""
    steps = build_schedule(load_config(name).scheduler, name).generation_steps(20)
    sigmas = [1 - i / 20 for i in range(20)]
    assert steps == pytest.approx([1000 * shift * s / (1 + (shift - 1) * s) for s in sigmas], abs=0.01)


@pytest.mark.parametrize('preset', [PRESETS[name] for name in UNETS], ids=UNETS)
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


@pytest.mark.parametrize('name', UNETS)
def test_samplers_take_the_timesteps_of_the_repositories(name):
    """As their scheduler/scheduler_config.json say; guided-diffusion counts from 0."""
    scheduler = load_config(name).scheduler
    expected = ('trailing', 1) if 'turbo' in name else ('leading', 0 if name in PIXELS else 1)
    assert (scheduler.get('timestep_spacing', 'leading'), scheduler.get('steps_offset', 0)) == expected


def test_all_presets_are_there():
    assert list(PRESETS) == NAMES
    assert all(get_preset(name).name == name for name in NAMES)


def test_single_files_are_described_by_presets():
    assert {name for names in SINGLE_FILE_PRESETS.values() for name in names} <= PRESETS.keys()


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(KeyError, match=r'did you mean.*sdxl'):
        get_preset('sdx1')


def test_hub_ids_are_recognised_under_all_their_names():
    assert preset_of_repo('stabilityai/stable-diffusion-2-1') is PRESETS['sd21']
    assert preset_of_repo('Manojb/stable-diffusion-2-1-base') is PRESETS['sd21-base']
    assert preset_of_repo('stable-diffusion-v1-5/stable-diffusion-v1-5') is PRESETS['sd15']  # not CleanDIFT
    assert preset_of_repo('somebody/else') is None

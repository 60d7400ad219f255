"""Layer sets: the published names and widths, on the topology they belong to."""

import pytest

from diffseg.diffusion.layer_sets import LAYER_SETS, expand, split_timesteps
from diffseg.diffusion.loading import meta_network
from diffseg.diffusion.sites import sites


@pytest.fixture
def sd(tiny_unet):
    return sites(tiny_unet())


@pytest.fixture
def sdxl(tiny_sdxl_unet):
    return sites(tiny_sdxl_unet())


@pytest.mark.parametrize(
    ('name', 'channels', 'strides'),  # at SD1.5's widths 320, 640, 1280: the published totals
    [
        ('practical', 3520, [32, 32, 16, 8]),
        ('legacy', 3520, [32, 16, 8, 8]),
        ('amalgamation', 2880, [32, 16, 8, 8]),
        ('dift', 1280, [16]),
        ('dhf', 10560, [64] * 3 + [32] * 3 + [16] * 3 + [8] * 3),
    ],
)
def test_sd_sets(tiny_unet, name, channels, strides):
    narrow = sites(tiny_unet(block_out_channels=(16, 32, 64, 64), norm_num_groups=16))
    layers = expand([name], narrow)
    assert sum(narrow[layer].channels for layer in layers) * 20 == channels
    assert [narrow[layer].stride for layer in layers] == strides


@pytest.mark.parametrize(
    ('name', 'channels', 'strides'),
    [
        ('practical', 3840, [32, 32, 16, 16]),
        ('legacy', 2240, [16, 8, 8]),
        ('amalgamation', 1280, [32]),
        ('dift', 640, [8]),
    ],
)
def test_sdxl_sets(tiny_sdxl_unet, name, channels, strides):
    narrow = sites(tiny_sdxl_unet(block_out_channels=(16, 32, 64), norm_num_groups=16))
    layers = expand([name], narrow)
    assert sum(narrow[layer].channels for layer in layers) * 20 == channels
    assert [narrow[layer].stride for layer in layers] == strides


@pytest.mark.parametrize(('name', 'channels', 'strides'), [('dift', 1024, [16]), ('ddpm-seg', 2816, [8, 8, 8, 4, 2])])
def test_adm_sets(name, channels, strides):
    available = sites(meta_network('ddpm-lsun-horse'))
    layers = expand([name], available)
    assert sum(available[layer].channels for layer in layers) == channels
    assert [available[layer].stride for layer in layers] == strides


def test_patterns_of_adm_aliases():
    available = sites(meta_network('ddpm-lsun-horse'))
    assert expand(['adm-*'], available) == expand([f'adm-{i}' for i in range(18)], available)


def test_no_variant(sd, sdxl):
    with pytest.raises(ValueError, match="'ddpm-seg' is published for a UNet of this"):
        expand(['ddpm-seg'], sd)
    with pytest.raises(ValueError, match="'dhf' is published for a UNet of this"):
        expand(['dhf'], sdxl)


def test_patterns_aliases_and_order(sd):
    assert expand(['dhf-2-1', 'mid-repeat?-res-out', 'dift', 'up-level1-upsampler-out'], sd) == [
        'up-level2-repeat1-res-increment',
        'mid-repeat0-res-out',
        'mid-repeat1-res-out',
        'up-level1-upsampler-out',
    ]
    assert expand(['*'], sd) == list(sd)
    assert expand(['dift-*'], sd) == expand([f'dift-{i}' for i in range(4)], sd)
    assert expand(['dhf-1-?'], sd) == [f'up-level1-repeat{i}-res-increment' for i in range(3)]
    with pytest.raises(ValueError, match=r"'up-level9\*'"):
        expand(['up-level9*'], sd)
    with pytest.raises(ValueError, match='cross-q'):
        expand(['up-level1-repeat1-vit-block0-crossq'], sd)


def test_sets_do_not_shadow_layers(sd, sdxl):
    assert not LAYER_SETS.keys() & (sd.keys() | sdxl.keys())


def test_layers_with_timesteps_of_their_own():
    readings, every = split_timesteps(['a@50', 'b', 'a@200+100', 'dift-1@-1'], [200, 100, 50, -1])
    assert readings == [('a', (50,)), ('b', (200, 100, 50, -1)), ('a', (200, 100)), ('dift-1', (-1,))]
    assert every == (200, 100, 50, -1)
    assert [reading.label(every) for reading in readings] == ['a@50', 'b', 'a@200+100', 'dift-1@-1']


def test_timesteps_may_be_left_out():
    assert split_timesteps(['a@200+50', 'b@100']) == ([('a', (200, 50)), ('b', (100,))], (50, 100, 200))


@pytest.mark.parametrize(
    ('layers', 'timesteps', 'message'),
    [
        (['a@50', 'b'], None, "'b' has no timesteps"),
        (['a@70'], [50], r'name timesteps \[70\] that are not in timesteps=\[50\]'),
        (['a@'], [50], "'a@' is malformed"),
        (['a@50,100'], [50], "'a@50,100' is malformed"),
        (['a@50+'], [50], 'malformed'),
        (['@50'], [50], 'malformed'),
        (['a@50', 'a@100+50'], None, 'listed twice: a@50'),
        ('dift-1', [50], "layers is the string 'dift-1'; give a list"),
        (['a'], '50', "timesteps is the string '50'; give a list"),
        (['a@.5'], [50], 'malformed'),
        (['a', 'a@50'], [50, 100], 'listed twice: a@50'),
        (['a@50+50'], None, 'listed twice: a@50'),
    ],
)
def test_timesteps_that_cannot_be_read(layers, timesteps, message):
    with pytest.raises(ValueError, match=message):
        split_timesteps(layers, timesteps)

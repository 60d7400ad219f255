import pytest
import tiny
import torch

from diffseg.diffusion.recorder import ActivationRecorder
from diffseg.diffusion.sites import resolve, sites


def test_aliases(tiny_unet, tiny_sdxl_unet):
    sd15, sdxl = sites(tiny_unet()), sites(tiny_sdxl_unet())
    assert resolve(['dift-1', 'dift-0', 'dift-3', 'dhf-2-1'], sd15) == [
        'up-level1-upsampler-out',
        'up-level0-upsampler-out',
        'up-level3-repeat2-vit-out',
        'up-level2-repeat1-res-increment',
    ]
    assert resolve(['dift-2', 'unet-in'], sdxl) == ['up-level2-repeat2-res-out', 'unet-in']


@torch.no_grad()
def test_dift_alias_is_the_output_of_the_block(tiny_sdxl_unet):
    unet = tiny_sdxl_unet()
    outputs = []
    for block in unet.up_blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    read = ActivationRecorder(unet, ['dift-0', 'dift-1', 'dift-2'], stop_early=False)(**tiny.inputs(unet))
    for ours, theirs in zip(read.values(), outputs, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize('config', tiny.PIXEL_TOPOLOGIES.values(), ids=tiny.PIXEL_TOPOLOGIES)
def test_aliases_of_a_pixel_network_count_residual_blocks(config):
    available = sites(tiny.pixel_unet(**config))
    attention = [int(kind.startswith('Attn')) for kind in config.get('up_block_types', ('Attn', 'Attn', ''))]
    expected = []
    for level, last in enumerate(['upsampler-out', 'upsampler-out', None]):
        out = 'vit-out' if attention[level] else 'res-out'
        blocks = [f'up-level{level}-repeat{repeat}-{out}' for repeat in range(3)]
        expected += [*blocks[:2], f'up-level{level}-{last}' if last else blocks[2]]
    assert resolve([f'adm-{i}' for i in range(9)], available) == expected
    assert resolve([f'dift-{i}' for i in range(9)], available) == expected
    with pytest.raises(ValueError, match="unknown activation 'adm-9'"):
        resolve(['adm-9'], available)


@pytest.mark.parametrize(
    ('name', 'nearest'),
    [
        ('adm-3', ''),
        ('up-level1-repeat1-vit-block1-cross-q', 'up-level1-repeat1-vit-block0-cross-q'),
        ('up_level1-repeat1-res-out', 'up-level1-repeat1-res-out'),
        ('dift-4', ''),
        ('dhf-4-0', 'up-level3-repeat0-res-increment'),
        ('', ''),
    ],
)
def test_unknown_names(tiny_unet, name, nearest):
    with pytest.raises(ValueError, match=f"unknown activation '{name}'; the nearest of .*{nearest}"):
        ActivationRecorder(tiny_unet(), ['unet-in', name])


def test_a_site_named_twice(tiny_unet):
    with pytest.raises(ValueError, match="'up-level1-upsampler-out' is named twice"):
        ActivationRecorder(tiny_unet(), ['dift-1', 'up-level1-upsampler-out'])


def test_a_string_in_place_of_names(tiny_unet):
    with pytest.raises(ValueError, match=r"layers is the string 'dift-1'; give a list, such as \['dift-1'\]"):
        resolve('dift-1', sites(tiny_unet()))

"""Sites of all kinds of networks: their real shapes are those that their descriptions say."""

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel

from diffseg.diffusion.recorder import ActivationRecorder
from diffseg.diffusion.sites import Network, Site, sites

SIMPLE_CROSS = {  # DeepFloyd IF's blocks: attention without transformers, residual samplers
    'down_block_types': ('ResnetDownsampleBlock2D', 'SimpleCrossAttnDownBlock2D'),
    'mid_block_type': 'UNetMidBlock2DSimpleCrossAttn',
    'up_block_types': ('SimpleCrossAttnUpBlock2D', 'ResnetUpsampleBlock2D'),
    'block_out_channels': (32, 64),
    'resnet_time_scale_shift': 'scale_shift',
}
TOPOLOGIES = {
    'sd15': {},
    'sd21': {'use_linear_projection': True, 'attention_head_dim': [2, 4, 8, 8], 'upcast_attention': True},
    'first-block-without-attention': {'down_block_types': ('DownBlock2D', *('CrossAttnDownBlock2D',) * 3)},
    'middle-without-attention': {'mid_block_type': 'UNetMidBlock2D'},
    'no-middle': {'mid_block_type': None},
    'x4-upscaler': {'only_cross_attention': (True, True, True, False), 'in_channels': 7},
    'floyd': SIMPLE_CROSS,
}


def number_of_keys(unet: UNet2DConditionModel, site: Site, cells: int) -> int:
    block, _, attention = site.path.rpartition('.')
    return 5 if attention == 'attn2' or unet.get_submodule(block).only_cross_attention else cells


def assert_as_described(unet: Network, height: int, width: int) -> None:
    """Every site's real shape, for a latent of `height` x `width`, is what its description says."""
    factor = 1 if isinstance(unet, UNet2DModel) else 8
    read = ActivationRecorder(unet, list(sites(unet)))(**tiny.inputs(unet, 2, height, width))
    for site in sites(unet).values():
        h, w = site.size(factor * height, factor * width)
        channels = site.channels or number_of_keys(unet, site, h * w)
        assert read[site.name].shape == (2, channels, h, w), site
        if site.kind == 'map':
            torch.testing.assert_close(read[site.name].sum(1), torch.ones(2, h, w))


@pytest.mark.parametrize('topology', TOPOLOGIES)
@torch.no_grad()
def test_every_site_is_as_described(tiny_unet, topology):
    assert_as_described(tiny_unet(**TOPOLOGIES[topology]), 16, 24)


@pytest.mark.parametrize('config', tiny.PIXEL_TOPOLOGIES.values(), ids=tiny.PIXEL_TOPOLOGIES)
@torch.no_grad()
def test_every_site_of_a_pixel_network_is_as_described(config):
    assert_as_described(tiny.pixel_unet(**config), 12, 20)


@pytest.mark.parametrize('make', ['tiny_unet', 'tiny_sdxl_unet'])
@pytest.mark.parametrize(('height', 'width'), [(24, 8), (11, 13)])
@torch.no_grad()
def test_every_site_is_as_described_whatever_the_size(request, make, height, width):
    assert_as_described(request.getfixturevalue(make)(), height, width)


def test_described_on_the_meta_device(tiny_unet):
    with torch.device('meta'):
        unet = tiny_unet()
    assert sites(unet) == sites(tiny_unet())
    site = sites(unet, vae_scale_factor=4)['mid-vit-out']
    assert site == Site('mid-vit-out', 'mid_block.attentions.0', 64, 32, 'spatial')


def test_a_network_that_is_not_described(tiny_pipeline):
    with pytest.raises(TypeError, match=r'AutoencoderKL cannot be read; .* UNet2DConditionModel, UNet2DModel'):
        sites(AutoencoderKL.from_pretrained(tiny_pipeline, subfolder='vae'))

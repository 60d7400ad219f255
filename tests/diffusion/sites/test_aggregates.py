import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from diffseg.diffusion.recorder import ActivationRecorder
from diffseg.diffusion.sites import Site, aggregates, sites


@torch.no_grad()
def test_aggregated_attention_of_any_shape(tiny_unet):
    unet = tiny_unet()
    given = tiny.inputs(unet, 2, 11, 14)
    recorder = ActivationRecorder(unet, [], attention=['up_cross', 'down_self'])
    read = recorder(**given)
    keys = 6 * 7 + 3 * 4  # of the self-attention at 1/2 and 1/4 of the latent
    assert list(read) == ['attn']
    assert read['attn'].shape == (2, 2 * 5 + keys, 11, 14)
    maps = [f'up-level1-repeat{repeat}-vit-block0-cross-map' for repeat in range(3)]
    by_layer = ActivationRecorder(unet, maps)(**given)
    quarter = torch.stack([by_layer[name] for name in maps]).mean(0)  # (B, 5, 3, 4)
    torch.testing.assert_close(read['attn'][:, :5], nn.functional.interpolate(quarter, size=(11, 14)))


@torch.no_grad()
def test_averaged_attention_is_one_map_for_each_size(tiny_unet):
    unet = tiny_unet()
    given = tiny.inputs(unet, 2, 12, 16)
    recorder = ActivationRecorder(unet, ['unet-out'], attention=['up_cross', 'down_cross'], attention_mode='average')
    read = recorder(**given)
    assert list(read) == ['unet-out', 'attn-16', 'attn-32']  # fine first, and not 64, where there is but the middle's
    assert [tuple(x.shape) for x in read.values()][1:] == [(2, 5, 6, 8), (2, 5, 3, 4)]
    for stride, levels in ((16, ('down-level1', 'up-level2')), (32, ('down-level2', 'up-level1'))):
        maps = [name for name in sites(unet) if name.startswith(levels) and name.endswith('cross-map')]
        assert len(maps) == 5  # two of the encoder, three of the decoder, all of one weight
        by_layer = torch.stack(list(ActivationRecorder(unet, maps)(**given).values()))
        torch.testing.assert_close(read[f'attn-{stride}'], by_layer.mean(0))
        torch.testing.assert_close(read[f'attn-{stride}'].sum(1), torch.ones(2, *by_layer.shape[-2:]))


def test_strides_of_averaged_attention_are_in_image_pixels(tiny_unet, tiny_sdxl_unet):
    def names(unet: UNet2DConditionModel, factor: int, *categories: str) -> list[str]:
        return [site.name for site, _ in aggregates(sites(unet, factor), categories, 'average')]

    assert names(tiny_unet(), 8, 'mid_cross', 'up_cross') == ['attn-16', 'attn-32', 'attn-64']
    assert names(tiny_unet(), 4, 'up_cross') == ['attn-8', 'attn-16']
    assert names(tiny_sdxl_unet(), 8, 'up_self', 'down_self') == ['attn-16', 'attn-32']


def test_channels_of_aggregated_attention(tiny_unet):
    available = sites(tiny_unet())
    ((attn, groups),) = aggregates(available, ['down_cross', 'up_cross'], 'concat', tokens=77)
    assert (attn.name, attn.channels, attn.stride, len(groups)) == ('attn', 308, 8, 4)
    fine, coarse = aggregates(available, ['down_cross', 'up_cross'], 'average', tokens=150)
    assert fine.site == Site('attn-16', '', 150, 16, 'map') and coarse.site == Site('attn-32', '', 150, 32, 'map')
    assert aggregates(available, ['up_self'], 'average', tokens=77)[0].site.channels is None


def test_unknown_and_empty_attention(tiny_unet):
    with pytest.raises(ValueError, match='down_cross, down_self'):
        ActivationRecorder(tiny_unet(), [], attention=['cross'])
    with pytest.raises(ValueError, match="'mid_cross' is empty"):
        ActivationRecorder(tiny_unet(), [], attention=['mid_cross'])
    with pytest.raises(ValueError, match="'mean'; it is 'concat' or 'average'"):
        ActivationRecorder(tiny_unet(), [], attention=['up_cross'], attention_mode='mean')
    with pytest.raises(ValueError, match='cannot be averaged'):
        ActivationRecorder(tiny_unet(), [], attention=['up_cross', 'up_self'], attention_mode='average')

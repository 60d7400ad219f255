"""What can be read in a UNet of pixels, without prompts, diffusers' `UNet2DModel`."""

from collections.abc import Iterator

from diffusers import UNet2DModel
from torch import nn

from diffseg.diffusion.sites.site import NetworkKind, Site
from diffseg.diffusion.sites.unet import walk_unet


def _walk_attention(name: str, path: str, attention: nn.Module, stride: int) -> Iterator[Site]:
    """Nothing: `walk_unet` itself lists the output of attention, and inside it there are no transformer blocks."""
    return iter(())


def _walk(unet: UNet2DModel, stride: int) -> Iterator[Site]:
    return walk_unet(unet, stride, _walk_attention)


PIXEL_UNET = NetworkKind(UNet2DModel, 1, _walk, block=r'up-level\d+-repeat\d+', block_aliases=('adm', 'dift'))

"""What can be read inside a network: every readable activation is a `Site`.

The names are those of "Not All Diffusion Model Activations Have Been Evaluated as Discriminative Features" (its code is
generic-diffusion-feature, GDF): 197 for Stable Diffusion 1.5 and 612 for SDXL. Each kind of network has a module that
describes it by data, listed in `KINDS`.
"""

from torch import nn

from diffseg.diffusion.sites.aggregates import ATTENTION, Aggregate, AttentionMode, aggregates
from diffseg.diffusion.sites.latent_unet import LATENT_UNET
from diffseg.diffusion.sites.names import aliases, nearest, refuse_string, resolve
from diffseg.diffusion.sites.pixel_unet import PIXEL_UNET
from diffseg.diffusion.sites.site import NetworkKind, Site

KINDS = (LATENT_UNET, PIXEL_UNET)
Network = LATENT_UNET.network | PIXEL_UNET.network

__all__ = [
    'ATTENTION',
    'Aggregate',
    'AttentionMode',
    'Network',
    'NetworkKind',
    'Site',
    'aggregates',
    'aliases',
    'default_scale_factor',
    'kind_of',
    'nearest',
    'refuse_string',
    'resolve',
    'sites',
]


def kind_of(network: nn.Module) -> NetworkKind:
    """The description of networks of this class.

    Raises:
        TypeError: There is none.
    """
    for kind in KINDS:
        if isinstance(network, kind.network):
            return kind
    known = ', '.join(kind.network.__name__ for kind in KINDS)
    raise TypeError(f'activations of a {type(network).__name__} cannot be read; the networks that can be are: {known}')


def sites(network: Network, vae_scale_factor: int | None = None) -> dict[str, Site]:
    """List everything that can be read inside a network, in order of execution.

    No forward pass is made, so the network may be on the meta device. The names in UNets (spec of GDF, all indices from
    0):

    * `unet-in`, `unet-after-conv-in`, `unet-out`
    * `{down,up}-level{L}-repeat{R}-res-{increment,out}`: a residual block before and after adding its shortcut
    * `{down,up}-level{L}-repeat{R}-vit-block{B}-{self-q,self-k,self-v,self-map,cross-q,cross-map,ffn-inner,out}`
    * `{down,up}-level{L}-repeat{R}-vit-out`
    * `down-level{L}-downsampler-out`, `up-level{L}-upsampler-out`
    * `mid-repeat{R}-res-...`, `mid-vit-...`

    The attention of pixel-space UNets is not inside transformer blocks; of it there is `vit-out` alone.

    Args:
        network: A `UNet2DConditionModel` (of latents) or `UNet2DModel` (of pixels).
        vae_scale_factor: Image pixels per latent cell; None is 8 for latents and 1 for pixels.

    Raises:
        TypeError: Another network.
    """
    kind = kind_of(network)
    return {site.name: site for site in kind.walk(network, vae_scale_factor or kind.vae_scale_factor)}


def default_scale_factor(network: Network) -> int:
    """Image pixels per cell of the network's input: 8 with Stable Diffusion's VAE, 1 without a VAE."""
    return kind_of(network).vae_scale_factor

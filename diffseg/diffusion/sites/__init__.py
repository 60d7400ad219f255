"""What can be read inside a network: every readable activation is a `Site`.

The names are those of "Not All Diffusion Model Activations Have Been Evaluated as Discriminative Features" (its code is
generic-diffusion-feature, GDF): 197 for Stable Diffusion 1.5 and 612 for SDXL. Each kind of network has a module that
describes it by data, listed in `KINDS`.
"""

from functools import reduce
from operator import or_

from torch import nn

from diffseg.diffusion.sites.aggregates import ATTENTION, Aggregate, AttentionMode, aggregates
from diffseg.diffusion.sites.latent_unet import LATENT_UNET
from diffseg.diffusion.sites.names import aliases, nearest, refuse_string, resolve
from diffseg.diffusion.sites.pixel_unet import PIXEL_UNET
from diffseg.diffusion.sites.site import NetworkKind, Site
from diffseg.diffusion.sites.transformer_tables import TRANSFORMERS

KINDS = (LATENT_UNET, PIXEL_UNET, *TRANSFORMERS)
Network = reduce(or_, (kind.network for kind in KINDS))

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
    supported = ', '.join(kind.network.__name__ for kind in KINDS)
    raise TypeError(
        f'activations of a {type(network).__name__} cannot be read; the networks that can be are: {supported}'
    )


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

    In transformers they are those of the image's tokens, never the text's; B counts the blocks of all stacks through
    (in Flux, single blocks go on after double ones):

    * `vit-block{B}-in`, `vit-block{B}-mod`: the block's raw input, and the same normalised and modulated (DiTF)
    * `vit-block{B}-{self-q,self-k,self-v,self-map,cross-q,cross-map,ffn-inner,out}` with self- and cross-attention
      (PixArt, Hunyuan-DiT, Sana; DiT without `cross`)
    * `vit-block{B}-{q,k,v,cross-map,self-map,attn-out,norm-out,ffn-inner,out}` with joint attention (SD3, Flux, Flux2,
      QwenImage, AuraFlow, Lumina2, ZImage; single blocks of Flux and Flux2 without `norm-out` and `ffn-inner`)
    * `vit-block{B}-attn2-{mod,q,k,v,self-map,out}`: the second attention of SD3.5-medium's first blocks
    * `refiner-vit-block{B}-...`: blocks of Lumina2 and ZImage that the image passes before it meets the text
    * `transformer-out`: the prediction; packed, where the network takes packed latents

    Args:
        network: A network of one of the classes that `KINDS` lists.
        vae_scale_factor: Image pixels per latent cell; None is 32 for Sana, 8 for other latents and 1 for pixels.

    Raises:
        TypeError: Another network.
    """
    kind = kind_of(network)
    return {site.name: site for site in kind.walk(network, vae_scale_factor or kind.vae_scale_factor)}


def default_scale_factor(network: Network) -> int:
    """Image pixels per cell of the latent: 8 with Stable Diffusion's VAE, 32 with Sana's, 1 without a VAE."""
    return kind_of(network).vae_scale_factor

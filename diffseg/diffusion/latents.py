"""Images to latents and back, through the VAEs of diffusers.

Latents are scaled as the network that reads them expects. Each class of VAEs has its way:

* `AutoencoderKL` (Stable Diffusion, SD3, Flux): (z - shift) * factor
* `AutoencoderTiny` (TAESD): the same; latents of those that were published come scaled, so that the factor is 1; there
  is no posterior to sample from
* `AutoencoderDC` (Sana's DC-AE): z * factor; no posterior either
* `AutoencoderKLQwenImage`: (z - mean) / std for every channel; it encodes videos, here of one frame
* `AutoencoderKLFlux2`: the same with the statistics of a batch norm, for every channel of patches of 2 x 2 cells
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderTiny,
    ModelMixin,
)
from torch import Tensor
from torch.nn import functional as F

from diffseg.devices import upload

DECODER_PARTS = ('decoder', 'post_quant_conv')  # of every VAE, which encoding does not need


class Posterior(NamedTuple):
    """A VAE's distribution of latents: mean and standard deviation (B, C, h, w); None where there is none."""

    mean: Tensor
    std: Tensor | None


class LatentSpace(NamedTuple):
    """What to do with one class of VAEs.

    Attributes:
        vae: The class, of diffusers.
        factor: Image pixels per latent cell, from the configuration.
        channels: Of a latent, from the configuration.
        encode: Unscaled posterior of images.
        decode: Images of unscaled latents.
        statistics: Shift and factor of latents, numbers or tensors that broadcast: scaled = (z - shift) * factor.
        patch: The statistics are those of patches of this height and width, whose cells are channels.
    """

    vae: type[ModelMixin]
    factor: Callable[[Mapping[str, Any]], int]
    channels: Callable[[Mapping[str, Any]], int]
    encode: Callable[[Any, Tensor], Posterior]
    decode: Callable[[Any, Tensor], Tensor]
    statistics: Callable[[Any, torch.device], tuple[Tensor | float, Tensor | float]]
    patch: int = 1


def _halvings(name: str) -> Callable[[Mapping[str, Any]], int]:
    return lambda config: 2 ** (len(config[name]) - 1)


def _gaussian(vae: ModelMixin, images: Tensor) -> Posterior:
    distribution = vae.encode(images).latent_dist
    return Posterior(distribution.mean, distribution.std)


def _gaussian_of_frame(vae: AutoencoderKLQwenImage, images: Tensor) -> Posterior:
    distribution = vae.encode(images.unsqueeze(2)).latent_dist
    return Posterior(distribution.mean.squeeze(2), distribution.std.squeeze(2))


def _of_config(vae: AutoencoderKL | AutoencoderTiny, device: torch.device) -> tuple[float, float]:
    return vae.config.shift_factor or 0, vae.config.scaling_factor


def _of_channels(vae: AutoencoderKLQwenImage, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (
        upload(torch.tensor(vae.config[name], device='cpu').view(-1, 1, 1), device)
        for name in ('latents_mean', 'latents_std')
    )
    return mean, 1 / std


def _of_batch_norm(vae: AutoencoderKLFlux2, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, variance = (x.to(device, torch.float32).view(-1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config.batch_norm_eps).rsqrt()


LATENT_SPACES = (
    LatentSpace(
        AutoencoderKL,
        factor=_halvings('block_out_channels'),
        channels=lambda config: config['latent_channels'],
        encode=_gaussian,
        decode=lambda vae, z: vae.decode(z).sample,
        statistics=_of_config,
    ),
    LatentSpace(
        AutoencoderTiny,
        factor=_halvings('encoder_block_out_channels'),
        channels=lambda config: config['latent_channels'],
        encode=lambda vae, images: Posterior(vae.encode(images).latents, None),
        decode=lambda vae, z: vae.decode(z).sample,
        statistics=_of_config,
    ),
    LatentSpace(
        AutoencoderDC,
        factor=_halvings('encoder_block_out_channels'),
        channels=lambda config: config['latent_channels'],
        encode=lambda vae, images: Posterior(vae.encode(images).latent, None),
        decode=lambda vae, z: vae.decode(z).sample,
        statistics=lambda vae, device: (0, vae.config.scaling_factor),
    ),
    LatentSpace(
        AutoencoderKLQwenImage,
        factor=lambda config: 2 ** len(config['temperal_downsample']),
        channels=lambda config: config['z_dim'],
        encode=_gaussian_of_frame,
        decode=lambda vae, z: vae.decode(z.unsqueeze(2)).sample.squeeze(2),
        statistics=_of_channels,
    ),
    LatentSpace(
        AutoencoderKLFlux2,
        factor=_halvings('block_out_channels'),
        channels=lambda config: config['latent_channels'],
        encode=_gaussian,
        decode=lambda vae, z: vae.decode(z).sample,
        statistics=_of_batch_norm,
        patch=2,
    ),
)
VAES = tuple(space.vae for space in LATENT_SPACES)
VAE = AutoencoderKL | AutoencoderTiny | AutoencoderDC | AutoencoderKLQwenImage | AutoencoderKLFlux2


def latent_space(vae: VAE | Mapping[str, Any]) -> LatentSpace:
    """The latent space of a VAE, or of a VAE's configuration, complete with `_class_name` unless `AutoencoderKL`."""
    name = vae.get('_class_name', AutoencoderKL.__name__) if isinstance(vae, Mapping) else type(vae).__name__
    return next(space for space in LATENT_SPACES if space.vae.__name__ == name)


def vae_scale_factor(config: Mapping[str, Any] | None) -> int:
    """Image pixels per latent cell for the configuration of a VAE; 1 without VAE."""
    return 1 if config is None else latent_space(config).factor(config)


def scale_latents(vae: VAE, latents: Tensor) -> Tensor:
    """Scale latents (B, C, h, w), in float32, as the network expects them."""
    space = latent_space(vae)
    shift, factor = space.statistics(vae, latents.device)
    return _unfolded(space.patch, latents, lambda z: (z - shift) * factor)


def decode(vae: VAE | None, latents: Tensor) -> Tensor:
    """Decode latents to images.

    Args:
        vae: With decoder, see `loading.load_vae`; None in pixel space, where latents are images.
        latents: Scaled as for the network, with shape (B, C, h, w).

    Returns:
        RGB in [-1, 1], with shape (B, 3, H, W), float32.
    """
    if vae is None:
        return latents.float().clamp(-1, 1)
    space = latent_space(vae)
    shift, factor = space.statistics(vae, latents.device)
    latents = _unfolded(space.patch, latents, lambda z: z / factor + shift)
    return space.decode(vae, latents.to(vae.dtype)).float().clamp(-1, 1)


def _unfolded(patch: int, latents: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to latents whose patches are channels."""
    if patch == 1:
        return function(latents)
    return F.pixel_shuffle(function(F.pixel_unshuffle(latents, patch)), patch)

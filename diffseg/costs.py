"""What it costs to extract activations of many images: operations, hours and bytes."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffseg.benchmarking import executed, timed
from diffseg.diffusion.extractor import DiffusionExtractor
from diffseg.diffusion.layer_sets import expand
from diffseg.diffusion.loading import load_config, meta_network
from diffseg.diffusion.options import group_options
from diffseg.diffusion.placeholders import placeholder_conditioning
from diffseg.diffusion.schedules import Timestep
from diffseg.diffusion.sites import sites

# Numbers of images: ADE20K's and ImageNet-1k's for training and validation, those of all pairs of SPair-71k
DATASETS = {
    'ADE20K': 20_210 + 2_000,
    'SPair-71k': 1_800,
    'ImageNet-1k': 1_281_167 + 50_000,
    '100 M images': 100_000_000,
}


@dataclass(frozen=True)
class Setting:
    """What is read of each image.

    Attributes:
        model: Preset, hub id or diffusers folder.
        size: Side of the images in pixels.
        layers: Names, aliases, patterns or set names.
        timesteps: Of the network.
        ensemble: Number of draws.
    """

    model: str | Path
    size: int
    layers: tuple[str, ...]
    timesteps: tuple[Timestep, ...] = (50,)
    ensemble: int = 1


SETTINGS = {
    'SD1.5, practical layers': Setting('sd15', 512, ('practical',)),
    'DIFT: SD2.1, E = 8': Setting('sd21', 768, ('dift',), (261,), 8),
    'SDXL, practical layers': Setting('sdxl', 1024, ('practical',)),
    'SD3-medium, one block': Setting('sd3-medium', 1024, ('vit-block9-out',), (260,)),
    'demo/tiny-sd, practical layers': Setting('demo/tiny-sd', 64, ('practical',)),
}


@dataclass(frozen=True)
class Cost:
    """Of one image.

    Attributes:
        flop: Floating-point operations of the VAE and of the passes of the network, see `benchmarking.executed`.
        values: Number of values in the activations.
    """

    flop: int
    values: int


def build(setting: Setting, vae: str | Path | None = None, **options: Any) -> DiffusionExtractor:
    """An extractor with random weights for a setting.

    Args:
        setting: What it reads.
        vae: An `AutoencoderTiny` in place of the model's VAE, if it has one, see `Weights`.
        **options: Further options, flat.
    """
    config = load_config(setting.model)
    if config.pixel_space:
        options |= {'random': (config.part,)}
    else:
        options |= {'random': (config.part, 'vae'), 'vae': vae}
    prompt = placeholder_conditioning(config.network)
    layers = expand(setting.layers, sites(meta_network(setting.model)))
    ensemble = {'ensemble': setting.ensemble}
    return DiffusionExtractor(
        setting.model, layers, setting.timesteps, prompt=prompt, **ensemble, **group_options(options)
    )


def cost(setting: Setting, vae: str | Path | None = None) -> Cost:
    """Count on the meta device: no weights, no time."""
    with torch.device('meta'):
        extractor = build(setting, vae)
        image = torch.empty(1, 3, setting.size, setting.size)
    activations: dict[str, Tensor] = {}
    with torch.no_grad():
        flop = executed(lambda: activations.update(extractor(image)))
    return Cost(flop, sum(x.numel() for x in activations.values()))


def sustained_rate(
    setting: Setting, device: str, repeat: int = 3, vae: str | Path | None = None, **options: Any
) -> float:
    """FLOP per second of extraction on a device: those of `cost` over the median time of one image."""
    extractor = build(setting, vae, **options, device=device).to(device)
    image = torch.zeros(1, 3, setting.size, setting.size, device=device)
    with torch.inference_mode():
        extractor(image)
        seconds = statistics.median(timed(lambda: extractor(image), device) for _ in range(repeat))
    return cost(setting, vae).flop / seconds

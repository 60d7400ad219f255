"""Channels of a transformer whose activations are far larger than the others (DiTF, arXiv 2505.18584, section 3)."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from diffseg.diffusion.layer_sets import split_timesteps
from diffseg.files import whole_file


class ChannelMagnitude(NamedTuple):
    """How large a channel is.

    Attributes:
        channel: Its index.
        times: Its magnitude in multiples of the median channel's, averaged over images.
        share: Of the images on which it is massive, between 0 and 1.
    """

    channel: int
    times: float
    share: float


def channel_magnitudes(magnitudes: Tensor, times: float = 10.0) -> list[ChannelMagnitude]:
    """All channels, the largest first, in multiples of the median channel.

    Args:
        magnitudes: Mean absolute value of each channel on each image, with shape (N, C).
        times: Multiple of the median above which a channel is massive.

    Raises:
        ValueError: `times` is not above 1.
    """
    if not times > 1:
        raise ValueError(f'times is {times}; massive channels exceed a multiple of the median, which is above 1')
    ratios = magnitudes.double() / magnitudes.double().median(dim=1, keepdim=True).values  # (N, C)
    means, shares = ratios.mean(dim=0).tolist(), (ratios > times).double().mean(dim=0).tolist()
    order = sorted(range(len(means)), key=lambda channel: -means[channel])
    return [ChannelMagnitude(channel, means[channel], shares[channel]) for channel in order]


def raw_layers(backbone: dict[str, Any]) -> list[str]:
    """The raw features that the modulated ones of a backbone's config are made of: where massive channels are.

    Raises:
        ValueError: It reads no modulated features.
    """
    readings, _ = split_timesteps(backbone['layers'], backbone.get('timesteps'))
    names = [re.sub(r'(-attn2)?-mod$', '-in', layer) for layer, _ in readings if layer.endswith('-mod')]
    if not names:
        raise ValueError(
            'the backbone of the config reads no modulated features, which `discard` is for; read a layer such as '
            'vit-block28-mod'
        )
    return list(dict.fromkeys(names))


def write_discarding_config(path: Path, base: Path, channels: Sequence[int]) -> None:
    """Write a config that inherits another one, and whose backbone discards channels.

    Args:
        path: The new config.
        base: The config that is inherited.
        channels: The channels.
    """
    folder = path.absolute().parent
    with whole_file(path) as partial:
        partial.write_text(
            f'_base_ = [{os.path.relpath(base.absolute(), folder)!r}]\n'
            f'model = dict(backbone=dict(discard={sorted(channels)}))\n'
        )

"""Names of activations: published aliases, and suggestions for an unknown name."""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

from diffseg.diffusion.sites.latent_unet import LATENT_UNET
from diffseg.diffusion.sites.pixel_unet import PIXEL_UNET


def resolve(names: Sequence[str], available: Iterable[str]) -> list[str]:
    """Translate aliases and check names.

    The aliases are `dift-{n}`, the output of decoder block n with its upsampler (DIFT's `up_ft_index`), and
    `dhf-{level}-{repeat}`, a residual increment of the decoder (the layers of Diffusion Hyperfeatures). In a network
    of pixels `adm-{i}` is guided-diffusion's `output_blocks.i`: a residual block of the decoder, counted through all
    levels, with the attention and the upsampler behind it; there `dift-{i}` means the same, as in DIFT.

    Args:
        names: Names of sites or aliases.
        available: The network's names in order of execution, as `sites` gives them.

    Returns:
        The names of sites in the order of `names`.

    Raises:
        ValueError: For an unknown name, with the nearest known ones, for one site named twice, or for a string in place
            of a sequence of them.
    """
    refuse_string('layers', names)
    available = list(available)
    site_of_alias = aliases(available)
    resolved = [
        site_of_alias.get(name) or re.sub(r'^dhf-(\d+)-(\d+)$', r'up-level\1-repeat\2-res-increment', name)
        for name in names
    ]
    for requested, name in zip(names, resolved, strict=True):
        if name not in available:
            raise ValueError(f'unknown activation {requested!r}; {nearest(name, available)}')
        if resolved.count(name) > 1:
            raise ValueError(f'activation {name!r} is named twice')
    return resolved


def refuse_string(option: str, value: object) -> None:
    """Raise a ValueError for a lone string, which would be taken for a sequence of letters."""
    if isinstance(value, str):
        raise ValueError(f'{option} is the string {value!r}; give a list, such as [{value!r}]')


def nearest(name: str, available: Sequence[str]) -> str:
    """End an error message: the five names that share most with an unknown name or pattern."""

    def likeness(candidate: str) -> tuple[int, int]:
        return sum(block.size for block in SequenceMatcher(None, name, candidate).get_matching_blocks()), -len(
            candidate
        )

    return f'the nearest of {len(available)} are: {", ".join(sorted(available, key=likeness, reverse=True)[:5])}'


def aliases(available: Iterable[str]) -> dict[str, str]:
    """Sites by alias in a network, see `resolve`; those of one kind in order of execution.

    Args:
        available: The network's names in order of execution.
    """
    available = list(available)
    kind = LATENT_UNET if any('-vit-block' in name for name in available) else PIXEL_UNET
    outputs = _block_outputs(available, kind.block)
    blocks = {f'{alias}-{i}': output for alias in kind.block_aliases for i, output in enumerate(outputs)}
    increments = (re.fullmatch(r'up-level(\d+)-repeat(\d+)-res-increment', name) for name in available)
    return blocks | {f'dhf-{match[1]}-{match[2]}': match[0] for match in increments if match}


def _block_outputs(available: Iterable[str], block: str) -> list[str]:
    """Last site of each block of the decoder; prefixes of its names match `block`."""
    outputs, current = {}, ''
    for name in available:
        if name.startswith('up-'):
            match = re.match(block, name)
            current = match[0] if match else current
            outputs[current] = name
    return list(outputs.values())

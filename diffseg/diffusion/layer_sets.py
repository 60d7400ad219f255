"""Named sets of layers from publications, and layers with timesteps of their own."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from typing import NamedTuple

from diffseg.diffusion.schedules import NUMBER, Timestep, parse_timestep
from diffseg.diffusion.sites import aliases, nearest, refuse_string, resolve

# Variants of a set are for different UNet topologies; the first one whose layers all exist is used.
LAYER_SETS: dict[str, tuple[tuple[str, ...], ...]] = {
    # Meng et al., "Not All Diffusion Model Activations Have Been Evaluated as Discriminative Features" (2410.03558):
    # GDF's config_{15,xl}_practical.json
    'practical': (
        (
            'up-level1-repeat1-vit-block0-cross-q',
            'up-level1-repeat2-res-out',
            'up-level2-repeat1-vit-block0-cross-q',
            'up-level3-repeat0-vit-block0-self-k',
        ),
        (
            'up-level0-repeat0-vit-block7-out',
            'up-level0-repeat0-vit-block5-out',
            'up-level1-repeat0-vit-block0-cross-q',
            'up-level1-repeat0-vit-block0-out',
        ),
    ),
    # layers of earlier work, the outputs of whole blocks: config_{15,xl}_legacy.json
    'legacy': (
        (
            'up-level0-upsampler-out',
            'up-level1-upsampler-out',
            'up-level2-upsampler-out',
            'up-level3-repeat2-vit-out',
        ),
        (
            'up-level0-upsampler-out',
            'up-level1-upsampler-out',
            'up-level2-repeat2-res-out',
        ),
    ),
    # a model's share in the ensemble of several: config_15_amalgamation.json (which adds the attention 'up_cross') and
    # config_pg_amalgamation.json
    'amalgamation': (
        (
            'up-level1-repeat1-vit-block0-cross-q',
            'up-level2-repeat1-vit-block0-cross-q',
            'up-level2-upsampler-out',
            'up-level3-repeat0-vit-block0-self-k',
        ),
        ('up-level0-repeat0-vit-block3-out',),
    ),
    # Tang et al., "Emergent Correspondence from Image Diffusion" (2306.03881): semantic matching, up_ft_index 4 of ADM
    # and 1 of Stable Diffusion
    'dift': (('adm-4',), ('dift-1',)),
    # Baranchuk et al., "Label-Efficient Semantic Segmentation with Diffusion Models" (2112.03126): output blocks of ADM
    'ddpm-seg': (('adm-5', 'adm-6', 'adm-7', 'adm-8', 'adm-12'),),
    # Luo et al., "Diffusion Hyperfeatures" (2305.14334): every residual increment of the decoder
    'dhf': (tuple(f'dhf-{level}-{repeat}' for level in range(4) for repeat in range(3)),),
}


def expand(names: Iterable[str], available: Iterable[str]) -> list[str]:
    """Expand set names, glob patterns and aliases to layer names.

    Args:
        names: any mixture of keys of `LAYER_SETS`, patterns such as `'up-*-res-out'` or `'adm-*'`, and names for
            `sites.resolve`.
        available: the UNet's layer names, in order of execution (`sites.sites`).

    Returns:
        Layer names in the order of `names`, without duplicates; those of a pattern in order of execution.

    Raises:
        ValueError: a set has no variant for this UNet, a pattern matches nothing, or a name is unknown.
    """
    refuse_string('layers', names)
    available = list(available)
    layers: list[str] = []
    for name in names:
        if name in LAYER_SETS:
            layers += _variant(name, available)
        elif set(name) & set('*?['):
            matches = [layer for layer in available if fnmatchcase(layer, name)]
            matches = matches or [layer for alias, layer in aliases(available).items() if fnmatchcase(alias, name)]
            if not matches:
                raise ValueError(f'no layer matches {name!r}; {nearest(name, available)}')
            layers += matches
        else:
            layers += resolve([name], available)
    return list(dict.fromkeys(layers))


class Reading(NamedTuple):
    """A layer, or an alias of it, and the timesteps at which it is read."""

    layer: str
    timesteps: tuple[Timestep, ...]

    def label(self, every: tuple[Timestep, ...]) -> str:
        """The layer, followed by its timesteps unless these are `every`."""
        return self.layer if self.timesteps == every else f'{self.layer}@{"+".join(map(str, self.timesteps))}'


def split_timesteps(
    layers: Sequence[str], timesteps: Sequence[Timestep] | None = None
) -> tuple[list[Reading], tuple[Timestep, ...]]:
    """Split names of layers from their timesteps.

    `'up-level1-upsampler-out@50'` is read at t = 50 alone, `'up-level1-upsampler-out@100+200'` at two timesteps, and a
    layer without `@` at all `timesteps`. Timesteps of rectified flow may be sigmas, as in `'vit-block9-out@0.26'`.

    Args:
        layers: names or aliases; a layer may be repeated with other timesteps.
        timesteps: of layers without timesteps; may be omitted if there are none.

    Returns:
        The readings, in the order of `layers`, and all timesteps, ascending if `timesteps` is omitted.

    Raises:
        ValueError: timesteps are malformed or missing, or a layer is listed twice at one timestep.
    """
    refuse_string('layers', layers)
    if timesteps is not None:
        refuse_string('timesteps', timesteps)
        timesteps = tuple(timesteps)
    readings: list[Reading] = []
    for text in layers:
        layer, at, suffix = text.partition('@')
        if at and not (layer and re.fullmatch(rf'{NUMBER}(\+{NUMBER})*', suffix)):
            raise ValueError(f"layer {text!r} is malformed; write its timesteps as in 'dift-1@50' or 'dift-1@100+200'")
        if not at and timesteps is None:
            raise ValueError(f"layer {text!r} has no timesteps; name them, as in '{text}@50', or give `timesteps`")
        readings.append(Reading(layer, tuple(map(parse_timestep, suffix.split('+')) if at else timesteps)))
    named = set(chain(*(reading.timesteps for reading in readings)))
    union = tuple(sorted(named) if timesteps is None else timesteps)
    if missing := sorted(named - set(union)):
        raise ValueError(f'layers name timesteps {missing} that are not in timesteps={list(union)}; add or omit these')
    pairs = Counter((layer, t) for layer, layer_timesteps in readings for t in layer_timesteps)
    if twice := [f'{layer}@{t}' for (layer, t), number in pairs.items() if number > 1]:
        raise ValueError(f'layers are listed twice: {", ".join(twice)}')
    return readings, union


def _variant(name: str, available: Sequence[str]) -> list[str]:
    for variant in LAYER_SETS[name]:
        try:
            return resolve(variant, available)
        except ValueError:
            continue
    raise ValueError(f'no layer set {name!r} is published for a UNet of this topology')

"""Candidates of a search, and the interface of their measures."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffseg.diffusion.schedules import NUMBER, Timestep, parse_timestep
from diffseg.diffusion.trajectories import seeded_noise


class Candidate(NamedTuple):
    """An activation at a timestep, written `name@t`."""

    layer: str
    timestep: Timestep

    def __str__(self) -> str:
        return f'{self.layer}@{self.timestep}'

    @classmethod
    def parse(cls, text: str) -> 'Candidate':
        """Parse `name@t`.

        Raises:
            ValueError: the text has another form.
        """
        layer, _, timestep = text.rpartition('@')
        if not layer or not re.fullmatch(NUMBER, timestep):
            raise ValueError(f"{text!r} is no candidate; write a name and a timestep, as 'up-level1-upsampler-out@50'")
        return cls(layer, parse_timestep(timestep))


Maps = Mapping[Candidate, Tensor | tuple[Tensor, Tensor]]  # (C, h, w) of a picture, or of both images of a pair
Reduction = Mapping[Candidate | str, Tensor]  # of one sample: by candidate, and by name what all share


class Measure(Protocol):
    """Score of candidates on a task. Samples are seen one by one and reduced to small tensors.

    Attributes:
        name: of the score, such as 'PCK@0.1-bbox/image'; higher is better.
        dim: maps with more channels are projected to this number before they are reduced, see `Projection`.
    """

    name: str
    dim: int

    def reduce(self, sample: Any, maps: Maps) -> dict[Candidate | str, Tensor]:
        """Reduce the maps of one sample to the tensors that `score` needs, on the CPU.

        Args:
            sample: a `SegDataSample` or a `PairSample`.
            maps: of all candidates.

        Returns:
            A small tensor for each candidate, and by name those of the sample itself, such as labels. Candidates that
            cannot be measured on this sample are left out.
        """

    def score(self, reductions: Sequence[Reduction], candidates: Sequence[Candidate]) -> float:
        """Score of candidates that are used together.

        Args:
            reductions: of all samples, always in the same order; each access may read from a file.
            candidates: one or several; their descriptors are normalised and concatenated.
        """

    def nbytes(self, channels: int, cells: int) -> int:
        """Approximate size of the reduction of one sample and candidate, in bytes.

        Args:
            channels: of its map.
            cells: of the finest map of all candidates.
        """


class Projection:
    """A random projection of maps with many channels that nearly preserves lengths and angles (Johnson-Lindenstrauss).

    The matrix is Gaussian and depends only on the seed, the activation's name and the two numbers of channels. Errors
    of a cosine are about 1 / sqrt(dim).

    Args:
        dim: number of channels to which maps with more are projected.
        seed: of the matrices.
    """

    def __init__(self, dim: int, seed: int = 0) -> None:
        if dim < 1:
            raise ValueError(f'dim is {dim}; it is a number of channels, 1 or more')
        self.dim = dim
        self.seed = seed
        self._matrices: dict[tuple[str, int], Tensor] = {}

    def __repr__(self) -> str:
        return f'Projection(dim={self.dim}, seed={self.seed})'

    def __call__(self, layer: str, maps: Tensor) -> Tensor:
        """(..., C, h, w) -> (..., min(C, dim), h, w)."""
        channels = maps.shape[-3]
        if channels <= self.dim:
            return maps
        if (layer, channels) not in self._matrices:
            matrix = seeded_noise((self.dim, channels), self.seed, 'projection', layer)
            self._matrices[layer, channels] = matrix / self.dim**0.5
        matrix = self._matrices[layer, channels].to(maps)
        return torch.einsum('dc,...chw->...dhw', matrix, maps)

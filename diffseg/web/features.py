"""Descriptors of all pictures, extracted in the background and kept in the cache of activations."""

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffseg.diffusion.layer_sets import split_timesteps
from diffseg.geometry import Size, resize
from diffseg.models import DiffusionBackbone

from .pictures import Picture, PictureFolder

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """Layers, with timesteps of their own (`'dift-1@261'`), that are read together."""

    layers: tuple[str, ...]

    @classmethod
    def of(cls, layers: Iterable[str], timesteps: Iterable[int]) -> 'Choice':
        """Each layer at all of the timesteps; a layer that has timesteps of its own at these."""
        suffix = '@' + '+'.join(map(str, timesteps))
        return cls(tuple(layer if '@' in layer else layer + suffix for layer in layers))

    @property
    def id(self) -> str:
        """Digest by which requests name the choice."""
        return hashlib.sha256('\n'.join(self.layers).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Descriptors:
    """What describes the cells of one picture.

    Attributes:
        cells: descriptors of unit length, row by row, with shape (h*w, C), bfloat16: products with them are limited by
            the memory that is read, and errors of a cosine are below a step of the heat maps.
        grid: h and w.
    """

    cells: Tensor
    grid: Size

    @classmethod
    def of(cls, maps: Sequence[Tensor]) -> 'Descriptors':
        """Concatenate maps (1, C_i, h_i, w_i), each of unit length in every cell, on the grid of the finest."""
        grid = max((tuple(x.shape[2:]) for x in maps), key=lambda size: size[0] * size[1])
        parts = [F.normalize(resize(x.float(), grid), dim=1) for x in maps]
        cells = F.normalize(torch.cat(parts, dim=1)[0].flatten(1).T, dim=1)  # (h*w, C)
        return cls(cells.bfloat16().contiguous(), grid)

    @property
    def map(self) -> Tensor:
        """The cells as a map (C, h, w), without a copy."""
        return self.cells.T.unflatten(1, self.grid)

    @property
    def nbytes(self) -> int:
        """Bytes of the cells."""
        return self.cells.nbytes


@dataclass
class Progress:
    """Extraction of one choice: ids of the pictures that are done, and errors of those that failed."""

    done: set[str] = field(default_factory=set)
    errors: dict[str, str] = field(default_factory=dict)


class FeatureStore:
    """Descriptors of pictures for any number of choices of layers, read with one network.

    One thread extracts what was requested, the last choice first. What was computed once stays in the backbone's cache
    on disk; in memory are the descriptors that were used last.

    Args:
        backbone: of the first choice, with a cache; it is in evaluation mode, on its device.
        folder: the pictures.
        memory: bytes of descriptors in memory.
        device: of images.

    Attributes:
        default: the choice of the backbone.
        revision: number of changes of any progress.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        folder: PictureFolder,
        memory: int = 2_000_000_000,
        device: torch.device | str = 'cpu',
    ) -> None:
        self.folder = folder
        self.memory = memory
        self.device = torch.device(device)
        self.default = self.resolve(backbone, backbone.layers, backbone.extractor.timesteps)
        self.revision = 0
        self._backbones = {self.default: backbone}
        self._progress: dict[Choice, Progress] = {}
        self._kept: OrderedDict[tuple[str, str], Descriptors] = OrderedDict()
        self._network = threading.Lock()  # one extraction at a time
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._extract_all, name='extraction', daemon=True)
        self.request(self.default)
        self._thread.start()

    @staticmethod
    def resolve(backbone: DiffusionBackbone, layers: Sequence[str], timesteps: Sequence[int]) -> Choice:
        """The choice of layers by their names.

        Raises:
            ValueError: an unknown layer, or a malformed or impossible timestep.
        """
        readings, every = split_timesteps(list(Choice.of(layers, timesteps).layers))
        resolved = backbone.extractor.reading([reading.layer for reading in readings], every).layers
        names = dict(zip(dict.fromkeys(reading.layer for reading in readings), resolved, strict=True))
        return Choice(tuple(f'{names[layer]}@{"+".join(map(str, at))}' for layer, at in readings))

    @property
    def backbone(self) -> DiffusionBackbone:
        """The backbone of the default choice."""
        return self._backbones[self.default]

    def choose(self, layers: Sequence[str], timesteps: Sequence[int]) -> Choice:
        """Resolve a choice and request it.

        Raises:
            ValueError: as `resolve`; or attention maps, whose channels differ between sizes of pictures.
        """
        choice = self.resolve(self.backbone, layers, timesteps)
        if choice not in self._backbones:
            backbone = self.backbone.reading(choice.layers)
            if None in backbone.channels:
                raise ValueError(f'{", ".join(choice.layers)}: attention maps have no fixed number of channels')
            self._backbones[choice] = backbone
        self.request(choice)
        return choice

    def request(self, choice: Choice) -> None:
        """Have all pictures extracted, before those of other choices."""
        with self._changed:
            progress = self._progress.pop(choice, Progress())
            self._progress[choice] = progress  # last
            self.revision += 1
            self._changed.notify_all()

    def by_id(self, key: str) -> Choice:
        """A requested choice by its id.

        Raises:
            KeyError: it was not requested.
        """
        for choice in list(self._progress):
            if choice.id == key:
                return choice
        raise KeyError(f'no layers were chosen with the id {key!r}; reload the page')

    def choices(self) -> dict[Choice, Progress]:
        """All requested choices, the most urgent last."""
        with self._changed:
            return dict(self._progress)

    def is_ready(self, choice: Choice, picture: Picture) -> bool:
        """Whether descriptors are at hand, in memory or on disk."""
        return picture.id in self._progress[choice].done

    def ready(self, choice: Choice) -> list[Picture]:
        """All pictures whose descriptors are at hand, in the folder's order."""
        return [picture for picture in self.folder.usable() if self.is_ready(choice, picture)]

    def get(self, choice: Choice, picture: Picture) -> Descriptors:
        """Descriptors of a picture, extracted now if they are not at hand.

        Raises:
            ValueError: the picture cannot be read or is too small.
        """
        key = choice.id, picture.id
        with self._changed:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        descriptors = self.extract(choice, picture)
        with self._changed:
            self._kept[key] = descriptors
            used = sum(kept.nbytes for kept in self._kept.values())
            while used > self.memory and len(self._kept) > 1:
                used -= self._kept.popitem(last=False)[1].nbytes
        return descriptors

    def extract(self, choice: Choice, picture: Picture) -> Descriptors:
        """Descriptors of a picture, from the backbone or its cache; raises what `get` does."""
        image = self.folder.tensor(picture).to(self.device)
        with self._network, torch.inference_mode():
            maps = self._backbones[choice](image)
        with torch.inference_mode():
            return Descriptors.of([x.cpu() for x in maps])

    def notify(self) -> None:
        """Look for new pictures."""
        with self._changed:
            self.revision += 1
            self._changed.notify_all()

    def close(self) -> None:
        """End the extraction after the picture that it is at."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _extract_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._next() is not None)
                if self._stopped:
                    return
                choice, picture = self._next()
            progress = self._progress[choice]
            try:
                self.get(choice, picture)
            except Exception as error:  # whatever it is, the other pictures are extracted
                logger.warning(f'{picture.name}: {error}')
                progress.errors[picture.id] = str(error)
            with self._changed:
                if picture.id not in progress.errors:
                    progress.done.add(picture.id)
                self.revision += 1

    def _next(self) -> tuple[Choice, Picture] | None:
        """What to extract next."""
        for choice, progress in reversed(self._progress.items()):
            for picture in self.folder.usable():
                if picture.id not in progress.done and picture.id not in progress.errors:
                    return choice, picture
        return None

"""Process samples: images to maps of all candidates, maps to the reductions of a measure, which are written to disk.

```text
sample -> images, each once -> VAE once, UNet for all activations and timesteps -> projection -> maps, kept while
later samples need them -> Measure.reduce -> OUT/STAGE/SAMPLE_SEED.safetensors -> Measure.score
```

A file depends on its sample only: images are never batched together. So the order, the number of runs and the number of
processes that write the files make no difference.
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from mmengine.dataset import BaseDataset
from mmengine.structures import BaseDataElement
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from diffseg.files import whole_file
from diffseg.models.backbones import DiffusionBackbone

from .grid import Candidate, Measure, Reduction

T = TypeVar('T')
Views = dict[str, Tensor]  # of one image: name -> (T, C, h, w)


class Draw(NamedTuple):
    """A sample and the seed of the noise for its images."""

    index: int
    seed: int

    def __str__(self) -> str:
        return f'{self.index:06d}_{self.seed}'


class Samples:
    """Pictures with labels, or pairs of pictures, as the model sees them.

    Args:
        dataset: in test mode, its pipeline without augmentation.
        preprocessor: of the model, which brings images to [-1, 1].
        prompt: may contain `{category}` for a pair's category; None keeps the prompt of the backbone.
    """

    def __init__(self, dataset: BaseDataset, preprocessor: nn.Module, prompt: str | None = None) -> None:
        self.dataset = dataset
        self.preprocessor = preprocessor
        self.prompt = prompt
        self._last: tuple[int, tuple] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def images(self, index: int) -> tuple[Hashable, ...]:
        """Keys that identify the images of a sample; empty if the sample cannot be read.

        Raises:
            ValueError: the data set gives no paths.
        """
        info = self.dataset.get_data_info(index)
        if 'damaged' in info:
            return ()
        prompt = self.prompt and self.prompt.format(**info)
        images = tuple((info[key], prompt) for key in ('img_path', 'img_path0', 'img_path1') if key in info)
        if not images:
            raise ValueError(
                f'sample {index} of {type(self.dataset).__name__} has no img_path, which identifies an image; let '
                f'get_data_info return img_path, or img_path0 and img_path1 of a pair'
            )
        return images

    def load(self, index: int) -> tuple[BaseDataElement, list[Tensor]]:
        """The annotation and the images (3, H, W), none if they cannot be read. The last sample is cached."""
        if self._last is None or self._last[0] != index:
            item = self.dataset[index]
            inputs, sample = item['inputs'], item['data_samples']
            batch = {view: [x] for view, x in inputs.items()} if isinstance(inputs, dict) else [inputs]
            batch = self.preprocessor({'inputs': batch, 'data_samples': [sample]}, training=False)['inputs']
            images = [x for (x,) in batch.values()] if isinstance(batch, dict) else list(batch)
            self._last = index, (sample, [] if 'damaged' in sample else images)
        return self._last[1]


class Reader:
    """Read the maps of one image for all activations and timesteps.

    Args:
        backbone: reads all layers at all timesteps.
        dtype: of the returned maps.
    """

    def __init__(self, backbone: DiffusionBackbone, dtype: torch.dtype = torch.float16) -> None:
        self.backbone = backbone.eval()
        self.dtype = dtype

    @torch.no_grad()
    def __call__(self, image: Tensor, prompt: str | None, seed: int) -> Views:
        """{name: (T, C, h, w)} of an image (3, H, W), on the CPU.

        Raises:
            ValueError: values do not fit the dtype.
        """
        self.backbone.extractor.seed = seed
        outputs = self.backbone(image[None], None if prompt is None else [prompt])  # L of (1, T*C, h, w)
        steps = len(self.backbone.extractor.timesteps)
        maps = {}
        for name, x in zip(self.backbone.extractor.layers, outputs, strict=True):
            maps[name] = x[0].unflatten(0, (steps, -1)).to('cpu', self.dtype)
            if not maps[name].isfinite().all():
                raise ValueError(f'{name} does not fit {self.dtype}; keep maps in float32')
        return maps


class Store(Sequence[Reduction]):
    """Reductions of all samples, one file per sample.

    Files are complete or absent. They are memory-mapped and read on access.

    Args:
        folder: that holds the files.
        draws: all samples with their seeds, in the order in which measures see them.
        candidates: of the reductions.
        settings: everything that the content depends on, as JSON; written to a new folder, compared with that of an
            existing one.

    Raises:
        ValueError: the folder holds reductions made with other settings.
    """

    def __init__(
        self, folder: Path, draws: Sequence[Draw], candidates: Sequence[Candidate], settings: Mapping[str, Any]
    ) -> None:
        self.folder = folder
        self.draws = draws
        self.candidates = candidates
        self.settings = {**settings, 'candidates': list(map(str, candidates))}
        self._numbers = {candidate: number for number, candidate in enumerate(candidates)}
        self._kept: dict[int, Reduction] = {}
        check_settings(folder / 'settings.json', self.settings)

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, position: int) -> Reduction:
        """The reduction of one sample."""
        if position not in self._kept:
            if not 0 <= position < len(self):
                raise IndexError(position)
            self._kept[position] = self._read(self._path(self.draws[position]))
        return self._kept[position]

    def missing(self) -> list[Draw]:
        """Samples without a file."""
        present = {path.stem for path in self.folder.glob('*.safetensors')}
        return [draw for draw in self.draws if str(draw) not in present]

    def write(self, draw: Draw, reduction: Reduction) -> None:
        """Write the reduction of one sample; tensors of one shape are stacked in one block."""
        groups: dict[tuple, list[int]] = {}
        for number, candidate in enumerate(self.candidates):
            if candidate in reduction:
                x = reduction[candidate]
                groups.setdefault((x.dtype, x.shape), []).append(number)
        tensors = {f'shared.{name}': x.contiguous() for name, x in reduction.items() if isinstance(name, str)}
        for group, numbers in enumerate(groups.values()):
            tensors[f'{group}.numbers'] = torch.tensor(numbers)
            tensors[f'{group}.values'] = torch.stack([reduction[self.candidates[number]] for number in numbers])
        with whole_file(self._path(draw)) as partial:
            save_file(tensors, partial)

    def _path(self, draw: Draw) -> Path:
        return self.folder / f'{draw}.safetensors'

    def _read(self, path: Path) -> Reduction:
        with safe_open(path, 'pt') as file:
            return _Stored({name: file.get_tensor(name) for name in file.keys()}, self.candidates, self._numbers)


class _Stored(Mapping):
    """Reduction in a file."""

    def __init__(
        self, tensors: Mapping[str, Tensor], candidates: Sequence[Candidate], numbers: Mapping[Candidate, int]
    ) -> None:
        self._candidates = candidates
        self._numbers = numbers
        self._shared = {name.removeprefix('shared.'): x for name, x in tensors.items() if name.startswith('shared.')}
        self._groups = [
            (x.tolist(), tensors[name.replace('numbers', 'values')])
            for name, x in tensors.items()
            if name.endswith('.numbers') and not name.startswith('shared.')
        ]

    def __getitem__(self, key: Candidate | str) -> Tensor:
        if isinstance(key, str):
            return self._shared[key]
        number = self._numbers[key]
        for members, values in self._groups:
            row = bisect_left(members, number)
            if row < len(members) and members[row] == number:
                return values[row]
        raise KeyError(key)

    def __iter__(self) -> Iterator[Candidate | str]:
        yield from self._shared
        for members, _ in self._groups:
            yield from (self._candidates[number] for number in members)

    def __len__(self) -> int:
        return len(self._shared) + sum(len(members) for members, _ in self._groups)


def collect(
    store: Store, shard: tuple[int, int], samples: Samples, reader: Reader, measure: Measure, max_bytes: float
) -> None:
    """Reduce the samples that are missing in the store.

    Args:
        store: to write to.
        shard: (i, n) processes the i-th of n blocks of consecutive samples, 0 <= i < n.
        samples: to read.
        reader: reads the maps.
        measure: reduces the maps.
        max_bytes: size of the maps that are kept for later samples, in addition to those of the current one.
    """
    missing = set(store.missing())
    todo = [draw for draw in select_shard(store.draws, shard) if draw in missing]
    keys = [[(image, draw.seed) for image in samples.images(draw.index)] for draw in todo]
    steps = {t: i for i, t in enumerate(reader.backbone.extractor.timesteps)}

    def make(position: int, view: int) -> Views:
        (_, prompt), seed = keys[position][view]
        images = samples.load(todo[position].index)[1]
        return reader(images[view], prompt, seed) if images else {}

    views = walk(keys, make, lambda maps: sum(x.nbytes for x in maps.values()), max_bytes)
    for draw, images_maps in zip(todo, tqdm(views, desc=store.folder.name, total=len(todo)), strict=True):
        sample, images = samples.load(draw.index)
        reduction: Reduction = {}
        if images and images_maps:
            maps = {c: tuple(view[c.layer][steps[c.timestep]] for view in images_maps) for c in store.candidates}
            reduction = measure.reduce(sample, maps if len(images_maps) > 1 else {c: x for c, (x,) in maps.items()})
        store.write(draw, reduction)


def rank(store: Store, measure: Measure) -> list[tuple[Candidate, float]]:
    """Rank all candidates that can be measured, best first; equal ones keep the order of the grid.

    Candidates are left out if some samples lack them or have another number of channels: attention whose keys are the
    cells of images of several sizes.

    Raises:
        ValueError: no sample can be used.
    """
    usable = [reduction for reduction in store if reduction]
    if not usable:
        raise ValueError('none of the samples could be read')
    shapes = {c: {reduction[c].shape[1:] if c in reduction else None for reduction in usable} for c in store.candidates}
    measurable = [c for c, distinct in shapes.items() if len(distinct) == 1 and None not in distinct]
    scores = {c: measure.score(usable, [c]) for c in measurable}
    return sorted(scores.items(), key=lambda pair: -pair[1])


def select_shard(draws: Sequence[Draw], shard: tuple[int, int]) -> Sequence[Draw]:
    """The i-th of n blocks of consecutive draws."""
    i, n = shard
    return draws[i * len(draws) // n : (i + 1) * len(draws) // n]


def walk(
    samples: Sequence[Sequence[Hashable]],
    make: Callable[[int, int], T],
    nbytes: Callable[[T], int],
    max_bytes: float,
) -> Iterator[list[T]]:
    """Yield the values that `make` computes for the images of each sample; values are cached for later samples.

    A value that no later sample needs is dropped at once. Beyond `max_bytes` those that are needed last are dropped
    first, and computed again.

    Args:
        samples: keys of the images of each sample.
        make: computes a value, from the positions of a sample and of an image in it.
        nbytes: size of a value.
        max_bytes: size of the values to keep between samples.
    """
    uses: dict[Hashable, list[int]] = {}
    for position in range(len(samples) - 1, -1, -1):
        for image in set(samples[position]):
            uses.setdefault(image, []).append(position)
    kept: dict[Hashable, T] = {}
    for position, images in enumerate(samples):
        for view, image in enumerate(images):
            if image not in kept:
                kept[image] = make(position, view)
        yield [kept[image] for image in images]
        for image in set(images):
            uses[image].pop()
        kept = {image: x for image, x in kept.items() if uses[image]}
        for image in sorted(kept, key=lambda image: -uses[image][-1]):
            if sum(map(nbytes, kept.values())) <= max_bytes:
                break
            del kept[image]


def peak_images(samples: Sequence[Sequence[Hashable]]) -> int:
    """The largest number of images of which `walk` keeps values at once with unlimited memory."""
    last = {image: position for position, images in enumerate(samples) for image in images}
    loaded: set[Hashable] = set()
    most = 0
    for position, images in enumerate(samples):
        loaded |= set(images)
        most = max(most, len(loaded))
        loaded = {image for image in loaded if last[image] > position}
    return most


def order(samples: Sequence[Sequence[Hashable]]) -> list[int]:
    """Order samples so that those that share images are near each other.

    The next sample is one with the fewest images that are not loaded; among these, one whose images are in the fewest
    remaining samples.
    """
    left: dict[Hashable, set[int]] = {}
    for number, images in enumerate(samples):
        for image in images:
            left.setdefault(image, set()).add(number)
    remaining = dict.fromkeys(range(len(samples)))
    loaded: set[Hashable] = set()
    ordered = []
    while remaining:
        near = set().union(*(left[image] for image in loaded)) or [next(iter(remaining))]

        costs = {
            number: (len(set(samples[number]) - loaded), sum(len(left[image]) for image in samples[number]), number)
            for number in near
        }
        number = min(near, key=costs.__getitem__)
        ordered.append(number)
        del remaining[number]
        for image in samples[number]:
            left[image].discard(number)
            loaded.add(image)
        loaded = {image for image in loaded if left[image]}
    return ordered


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings to a new file, or compare them with those of an existing one.

    Raises:
        ValueError: they differ; the message names the keys.
    """
    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        with whole_file(path) as partial:
            partial.write_text(json.dumps(settings, indent=2) + '\n')
        return
    stored = json.loads(path.read_text())
    if different := [key for key in {**stored, **settings} if stored.get(key) != settings.get(key)]:
        raise ValueError(
            f'{path.parent} holds results of another search, which differs in {", ".join(different)}; choose another '
            f'folder, or delete it'
        )

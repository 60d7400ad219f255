"""Going over samples: images into maps of all candidates, maps into what a measure keeps, and that onto the disk.

```text
sample -> images, each once -> VAE once, UNet for all activations and timesteps -> projection -> maps, kept for as long
as later samples need them -> Measure.reduce -> OUT/STAGE/SAMPLE_SEED.safetensors -> Measure.score
```

Every file depends on its own sample alone: an image is never in a batch with another one. So it does not matter in
which order, in how many runs and by how many processes they are written.
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


class Place(NamedTuple):
    """A sample, and the seed of the noise that its images get."""

    index: int
    seed: int

    def __str__(self) -> str:
        return f'{self.index:06d}_{self.seed}'


class Samples:
    """Pictures with labels, or pairs of pictures, as the model sees them.

    Args:
        dataset: in test mode, its pipeline without augmentation.
        preprocessor: of the model, which brings images to [-1, 1].
        prompt: with `{category}` in place of a pair's category; None leaves the backbone's own.
    """

    def __init__(self, dataset: BaseDataset, preprocessor: nn.Module, prompt: str | None = None) -> None:
        self.dataset = dataset
        self.preprocessor = preprocessor
        self.prompt = prompt
        self._last: tuple[int, tuple] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def images(self, index: int) -> tuple[Hashable, ...]:
        """What tells the images of a sample from those of others; nothing if it cannot be read.

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
                f'sample {index} of {type(self.dataset).__name__} has no img_path, by which images are told apart; let '
                f'get_data_info return img_path, or img_path0 and img_path1 of a pair'
            )
        return images

    def load(self, index: int) -> tuple[BaseDataElement, list[Tensor]]:
        """The annotation and the images (3, H, W); none if they cannot be read. The last sample is kept."""
        if self._last is None or self._last[0] != index:
            item = self.dataset[index]
            inputs, sample = item['inputs'], item['data_samples']
            batch = {view: [x] for view, x in inputs.items()} if isinstance(inputs, dict) else [inputs]
            found = self.preprocessor({'inputs': batch, 'data_samples': [sample]}, training=False)['inputs']
            images = [x for (x,) in found.values()] if isinstance(found, dict) else list(found)
            self._last = index, (sample, [] if 'damaged' in sample else images)
        return self._last[1]


class Reader:
    """Maps of one image, of all activations and timesteps.

    Args:
        backbone: that has them, all layers at all timesteps.
        dtype: in which they are kept.
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
        maps = self.backbone(image[None], None if prompt is None else [prompt])  # L of (1, T*C, h, w)
        steps = len(self.backbone.extractor.timesteps)
        found = {}
        for name, x in zip(self.backbone.extractor.layers, maps, strict=True):
            found[name] = x[0].unflatten(0, (steps, -1)).to('cpu', self.dtype)
            if not found[name].isfinite().all():
                raise ValueError(f'{name} does not fit {self.dtype}; keep maps in float32')
        return found


class Store(Sequence[Reduction]):
    """What a measure keeps of all samples, a file for each.

    Files are whole or absent. They are mapped into memory, and read where they are used.

    Args:
        folder: of the files.
        places: all samples, in the order in which measures see them.
        candidates: of which something is kept.
        settings: all that the content depends on, as JSON; written into an empty folder and compared with another's.

    Raises:
        ValueError: the folder holds what was made with other settings.
    """

    def __init__(
        self, folder: Path, places: Sequence[Place], candidates: Sequence[Candidate], settings: Mapping[str, Any]
    ) -> None:
        self.folder = folder
        self.places = places
        self.candidates = candidates
        self.settings = {**settings, 'candidates': list(map(str, candidates))}
        self._numbers = {candidate: number for number, candidate in enumerate(candidates)}
        self._kept: dict[int, Reduction] = {}
        check_settings(folder / 'settings.json', self.settings)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, position: int) -> Reduction:
        """Of one sample."""
        if position not in self._kept:
            if not 0 <= position < len(self):
                raise IndexError(position)
            self._kept[position] = self._read(self._path(self.places[position]))
        return self._kept[position]

    def missing(self) -> list[Place]:
        """Samples of which there is no file."""
        there = {path.stem for path in self.folder.glob('*.safetensors')}
        return [place for place in self.places if str(place) not in there]

    def write(self, place: Place, reduction: Reduction) -> None:
        """Keep one sample's; tensors of one shape lie in one block."""
        groups: dict[tuple, list[int]] = {}
        for number, candidate in enumerate(self.candidates):
            if candidate in reduction:
                x = reduction[candidate]
                groups.setdefault((x.dtype, x.shape), []).append(number)
        tensors = {f'shared.{name}': x.contiguous() for name, x in reduction.items() if isinstance(name, str)}
        for group, numbers in enumerate(groups.values()):
            tensors[f'{group}.numbers'] = torch.tensor(numbers)
            tensors[f'{group}.values'] = torch.stack([reduction[self.candidates[number]] for number in numbers])
        with whole_file(self._path(place)) as partial:
            save_file(tensors, partial)

    def _path(self, place: Place) -> Path:
        return self.folder / f'{place}.safetensors'

    def _read(self, path: Path) -> Reduction:
        with safe_open(path, 'pt') as file:
            return _Stored({name: file.get_tensor(name) for name in file.keys()}, self.candidates, self._numbers)


class _Stored(Mapping):
    """The content of a file."""

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
    """Reduce the samples that the store has not yet.

    Args:
        store: to write to.
        shard: (i, n) does the i-th of n runs of neighbouring samples, 0 <= i < n.
        samples: where they are read.
        reader: of maps.
        measure: that reduces them.
        max_bytes: of maps to keep for later samples; those of the sample at hand come on top.
    """
    missing = set(store.missing())
    todo = [place for place in part(store.places, shard) if place in missing]
    keys = [[(image, place.seed) for image in samples.images(place.index)] for place in todo]
    steps = {t: i for i, t in enumerate(reader.backbone.extractor.timesteps)}

    def make(position: int, view: int) -> Views:
        (_, prompt), seed = keys[position][view]
        images = samples.load(todo[position].index)[1]
        return reader(images[view], prompt, seed) if images else {}

    views = walk(keys, make, lambda maps: sum(x.nbytes for x in maps.values()), max_bytes)
    for place, found in zip(todo, tqdm(views, desc=store.folder.name, total=len(todo)), strict=True):
        sample, images = samples.load(place.index)
        reduction: Reduction = {}
        if images and found:
            maps = {c: tuple(view[c.layer][steps[c.timestep]] for view in found) for c in store.candidates}
            reduction = measure.reduce(sample, maps if len(found) > 1 else {c: x for c, (x,) in maps.items()})
        store.write(place, reduction)


def rank(store: Store, measure: Measure) -> list[tuple[Candidate, float]]:
    """All candidates that can be measured, the best first; of equal ones the first of the grid.

    Those are left out that not all samples have, or not with the same number of channels: attention whose keys are the
    cells of images of several sizes.

    Raises:
        ValueError: there is no sample that can be used.
    """
    usable = [reduction for reduction in store if reduction]
    if not usable:
        raise ValueError('none of the samples could be read')
    shapes = {c: {reduction[c].shape[1:] if c in reduction else None for reduction in usable} for c in store.candidates}
    measurable = [c for c, found in shapes.items() if len(found) == 1 and None not in found]
    scores = {c: measure.score(usable, [c]) for c in measurable}
    return sorted(scores.items(), key=lambda pair: -pair[1])


def part(places: Sequence[Place], shard: tuple[int, int]) -> Sequence[Place]:
    """The i-th of n runs."""
    i, n = shard
    return places[i * len(places) // n : (i + 1) * len(places) // n]


def walk(
    samples: Sequence[Sequence[Hashable]],
    make: Callable[[int, int], T],
    nbytes: Callable[[T], int],
    max_bytes: float,
) -> Iterator[list[T]]:
    """What is made of the images of each sample, made anew only where it does not fit into memory until then.

    What no later sample needs is forgotten at once, and what is too much in the order in which it is needed, the last
    first.

    Args:
        samples: the images of each.
        make: called with the positions of a sample and of an image in it.
        nbytes: of what is made.
        max_bytes: to keep between samples.
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


def most_at_once(samples: Sequence[Sequence[Hashable]]) -> int:
    """How many images `walk` has at once where memory does not matter."""
    last = {image: position for position, images in enumerate(samples) for image in images}
    at_hand: set[Hashable] = set()
    most = 0
    for position, images in enumerate(samples):
        at_hand |= set(images)
        most = max(most, len(at_hand))
        at_hand = {image for image in at_hand if last[image] > position}
    return most


def order(samples: Sequence[Sequence[Hashable]]) -> list[int]:
    """An order of samples in which those that share images are near each other.

    Next comes a sample with the fewest images that are not at hand; among these, one whose images are in the fewest
    samples that are left.
    """
    left: dict[Hashable, set[int]] = {}
    for number, images in enumerate(samples):
        for image in images:
            left.setdefault(image, set()).add(number)
    remaining = dict.fromkeys(range(len(samples)))
    at_hand: set[Hashable] = set()
    found = []
    while remaining:
        near = set().union(*(left[image] for image in at_hand)) or [next(iter(remaining))]

        costs = {
            number: (len(set(samples[number]) - at_hand), sum(len(left[image]) for image in samples[number]), number)
            for number in near
        }
        number = min(near, key=costs.__getitem__)
        found.append(number)
        del remaining[number]
        for image in samples[number]:
            left[image].discard(number)
            at_hand.add(image)
        at_hand = {image for image in at_hand if left[image]}
    return found


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings to a new file, or compare them with those that are there.

    Raises:
        ValueError: they differ; says in what.
    """
    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        with whole_file(path) as partial:
            partial.write_text(json.dumps(settings, indent=2) + '\n')
        return
    there = json.loads(path.read_text())
    if different := [key for key in {**there, **settings} if there.get(key) != settings.get(key)]:
        raise ValueError(
            f'{path.parent} holds results of another search, which differs in {", ".join(different)}; choose another '
            f'folder, or delete it'
        )

"""Extraction of activations on a Ray cluster.

```text
files -> read: their images, decoded -> Extraction: an actor for each device -> FeatureSink: shards
```

Scheduling, retries, restarts and limits of memory are those of Ray Data. An image or file that cannot be used is a row
with an `error`, so that it is listed in the end and all others go on.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from secrets import token_hex
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow
import ray
import ray.data
import torch
from fsspec import AbstractFileSystem
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink, WriteResult

from diffseg.devices import default_device
from diffseg.diffusion.images import read_pixels
from diffseg.feature_extraction import LOOK_AHEAD, StoredActivations, batches, upload_pixels
from diffseg.feature_files import features_to_bytes, metadata
from diffseg.feature_shards import Failure, Features, File, is_shard, read_pictures, shard_to_bytes
from diffseg.files import locate, write_bytes

if TYPE_CHECKING:
    from diffseg.diffusion.extractor import DiffusionExtractor

IMAGES = 256  # files of a task that reads images
FILES = pyarrow.schema(
    [('path', 'string'), ('name', 'string'), ('state', 'string'), ('done', pyarrow.list_(pyarrow.string()))]
)
PIXELS = pyarrow.schema(
    [
        ('name', 'string'),
        ('state', 'string'),
        ('pixels', 'large_binary'),
        ('height', 'int32'),
        ('width', 'int32'),
        ('error', 'string'),
    ]
)
FEATURES = pyarrow.schema([('name', 'string'), ('state', 'string'), ('features', 'large_binary'), ('error', 'string')])


class Member(NamedTuple):
    """An image, and the state of its file."""

    name: str
    state: str


class Settings(NamedTuple):
    """Of the actors.

    Attributes:
        make: Makes the extractor on a device.
        device: None is the accelerator that Ray gives to the actor, or its CPUs.
        cpus: Of an actor, and threads of its extractor on them.
        gpus: Of an actor.
        save_dtype: Of the activations in the shards.
        batch: Images of one size in one forward pass.
    """

    make: Callable[[str], 'DiffusionExtractor']
    device: str | None
    cpus: int
    gpus: int
    save_dtype: torch.dtype
    batch: int


def start(address: str | None = None) -> Mapping[str, float]:
    """Connect to a cluster, or start one on this machine alone.

    Args:
        address: Of the head node, as HOST:PORT, or 'auto' for the cluster of which this machine is a node. None is that
            of the environment variable `RAY_ADDRESS`, and without it starts a cluster.

    Returns:
        What the cluster has: `CPU`, `GPU`, ...

    Raises:
        ConnectionError: There is no such cluster.
    """
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    ray.init(address or os.environ.get('RAY_ADDRESS', 'local'), ignore_reinit_error=True)
    return ray.cluster_resources()


def find_fingerprint(settings: Settings) -> dict[str, Any]:
    """Fingerprint of the extractors, from a node that has what an actor needs."""
    task = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus)(lambda: _make(settings).fingerprint)
    return ray.get(task.remote())


def _make(settings: Settings) -> 'DiffusionExtractor':
    device = settings.device or default_device()
    if device == 'cpu':
        torch.set_num_threads(settings.cpus)
    return settings.make(device)


def extract_files(
    files: Sequence[File],
    fs: AbstractFileSystem,
    sink: 'FeatureSink',
    settings: Settings,
    fingerprint: Mapping[str, Any],
    stored: Mapping[str, Any],
    actors: int,
    column: str = 'image',
) -> None:
    """Write the activations of all images of files.

    Args:
        files: To read.
        fs: Of the files.
        sink: Of the activations.
        settings: Of the actors.
        fingerprint: Of the extractors, from `find_fingerprint`.
        stored: All else of the configuration; `size` as in `read_pixels`.
        actors: Number of them.
        column: As in `read_pictures`.
    """
    if not files:
        return
    tasks = [[file] for file in files if is_shard(file.path)]
    images = [file for file in files if not is_shard(file.path)]
    tasks += [images[i : i + IMAGES] for i in range(0, len(images), IMAGES)]
    blocks = [pyarrow.Table.from_pylist([file._asdict() for file in task], FILES) for task in tasks]
    # where CPUs compute, actors may take them all, after the loss of a node too: other tasks must not wait for one
    cpus, concurrency = (1, None) if settings.gpus else (0, actors)
    ray.data.from_arrow(blocks).map_batches(
        read,
        batch_size=None,
        batch_format='pyarrow',
        fn_kwargs={'fs': fs, 'size': stored['size'], 'column': column},
        compute=ray.data.TaskPoolStrategy(concurrency),
        num_cpus=cpus,
    ).map_batches(
        Extraction,
        batch_size=settings.batch * LOOK_AHEAD,
        batch_format='pyarrow',
        fn_constructor_args=(settings, fingerprint, stored),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=settings.cpus,
        num_gpus=settings.gpus,
    ).write_datasink(sink, ray_remote_args={'num_cpus': cpus}, concurrency=concurrency)


def read(
    table: pyarrow.Table, fs: AbstractFileSystem, size: tuple[int, int] | None, column: str
) -> Iterator[pyarrow.Table]:
    """Decode the images of `FILES` into rows of `PIXELS`."""
    for file in table.to_pylist():
        for picture in read_pictures(fs, file['path'], file['name'], set(file['done']), column):
            row = {'name': picture.name, 'state': file['state'], 'error': picture.error}
            if picture.content is not None:
                try:
                    pixels = read_pixels(picture.name, size, picture.content).permute(1, 2, 0)  # (H, W, 3)
                except ValueError as error:
                    row['error'] = str(error).removeprefix(f'{picture.name}: ')
                else:
                    row |= {'pixels': pixels.numpy().tobytes(), 'height': pixels.shape[0], 'width': pixels.shape[1]}
            yield pyarrow.Table.from_pylist([row], PIXELS)


class Extraction:
    """What an actor does: rows of `PIXELS` to rows of `FEATURES`.

    Args:
        settings: Of the actors.
        fingerprint: Of their extractors.
        stored: All else of the configuration.

    Raises:
        ValueError: The extractor of this node has another fingerprint than the run.
    """

    def __init__(self, settings: Settings, fingerprint: Mapping[str, Any], stored: Mapping[str, Any]):
        self.settings = settings
        self.configuration = {**fingerprint, **stored}
        self.extractor = _make(settings)
        self.device = next(self.extractor.parameters()).device
        here = self.extractor.fingerprint
        differing = [key for key in {**fingerprint, **here} if fingerprint.get(key) != here.get(key)]
        if differing:
            raise ValueError(
                f'nodes of the cluster differ in {", ".join(differing)}: give all the same weights, and name a --dtype'
            )

    def __call__(self, table: pyarrow.Table) -> Iterator[pyarrow.Table]:
        """Extract images, those of one size together; a batch is packed while the device computes the next."""
        before = None
        for members, images in batches(_samples(table), self.settings.batch):
            if isinstance(images, str):
                yield _failures([members], images)
                continue
            try:
                with torch.inference_mode():
                    activations = self.extractor(upload_pixels(images, self.device))
                    stored = StoredActivations.convert(activations, self.settings.save_dtype).to_host()
            except ValueError as error:  # of all images of this size
                yield _failures(members, str(error))
                continue
            if before is not None:
                yield self._pack(*before)
            before = members, images[0].shape[:2], *stored
        if before is not None:
            yield self._pack(*before)

    def _pack(
        self,
        members: Sequence[Member],
        size: tuple[int, int],
        activations: StoredActivations,
        copied: torch.cuda.Event | None,
    ) -> pyarrow.Table:
        if copied is not None:
            copied.synchronize()
        rows = []
        for i, member in enumerate(members):
            entries = {**metadata(*member, self.configuration), 'input_size': 'x'.join(map(str, size))}
            try:
                rows.append({**member._asdict(), 'features': features_to_bytes(activations.image(i), entries)})
            except FloatingPointError as error:
                rows.append({**member._asdict(), 'error': str(error)})
        return pyarrow.Table.from_pylist(rows, FEATURES)


def _samples(table: pyarrow.Table) -> Iterator[tuple[Member, np.ndarray | str]]:
    for row in table.to_pylist():
        pixels = row['error']
        if pixels is None:
            pixels = np.frombuffer(row['pixels'], np.uint8).reshape(row['height'], row['width'], 3)
        yield Member(row['name'], row['state']), pixels


def _failures(members: Iterable[Member], error: str) -> pyarrow.Table:
    return pyarrow.Table.from_pylist([{**member._asdict(), 'error': error} for member in members], FEATURES)


class FeatureSink(Datasink):
    """Writes each block of `FEATURES` to a shard, and collects the errors.

    Args:
        out: Folder, local or behind fsspec, into which all nodes can write.
        suffix: Of the shards, `.tar` or `.parquet`.

    Attributes:
        written: Number of images that were written.
        failures: Of all others.
    """

    def __init__(self, out: str, suffix: str):
        self.fs, self.folder = locate(out)
        self.suffix = suffix
        self.run = token_hex(4)
        self.written = 0
        self.failures: list[Failure] = []

    def write(self, blocks: Iterable[Block], ctx: Any) -> tuple[int, list[Failure]]:
        """Write a shard. It is named after the task, so that a task that Ray repeats replaces it."""
        rows = [row for block in blocks for row in BlockAccessor.for_block(block).to_arrow().to_pylist()]
        features = [Features(row['name'], row['state'], row['features']) for row in rows if row['error'] is None]
        if features:
            path = f'{self.folder.rstrip("/")}/features-{self.run}-{ctx.task_idx:06}{self.suffix}'
            write_bytes(self.fs, path, shard_to_bytes(features, self.suffix))
        return len(features), [(row['name'], row['error']) for row in rows if row['error'] is not None]

    def on_write_complete(self, write_result: WriteResult[tuple[int, list[Failure]]]) -> None:
        """Collect what the tasks returned."""
        for written, failures in write_result.write_returns:
            self.written += written
            self.failures += failures

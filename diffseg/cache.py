"""Activations on disk, keyed by the content of the image that they were computed from.

```text
FOLDER/ab/abcd....safetensors    the maps of one image; the name is the digest of everything they depend on
FOLDER/.size                     bytes of all entries, never too small
FOLDER/.lock                     held while an entry is counted and renamed
FOLDER/.partial/                 incomplete files of writing processes
```
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from logging import WARNING
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from mmengine.logging import print_log
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from diffseg import __version__
from diffseg.files import remove_abandoned, whole_file

DTYPES = {name: getattr(torch, name) for name in ('float16', 'bfloat16', 'int8', 'float32')}
UNITS = {'B': 1, 'kB': 10**3, 'MB': 10**6, 'GB': 10**9, 'TB': 10**12}
LOW_WATER = 0.9  # eviction frees a tenth of the limit at once, since it lists all entries
POLL = 0.005  # seconds between attempts to get the lock
HEADER = 128, 96  # bytes that an entry's header takes, and each tensor's description in it; about
VALUES = 2  # part of every key; raised when an image's maps change (2: cells tile images of any size)
SCALE = '{}.scale'  # name of the scales of the int8 map of that number


class DamagedEntryError(ValueError):
    """A file whose content is not what was written under its name."""


@dataclass
class CacheCounts:
    """Counts of a cache object: images read, images computed, entries deleted and damaged entries."""

    hits: int = 0
    misses: int = 0
    evicted: int = 0
    damaged: int = 0

    def __str__(self) -> str:
        return f'{self.hits} hits, {self.misses} misses, {self.evicted} evicted, {self.damaged} damaged'


class FeatureCache:
    """A folder of activations that are computed once.

    An entry's name is the digest of the image's bytes and of the `context`, so a repeated input is a hit and an
    augmented one a miss, with any data pipeline. The caller must put everything else that activations depend on into
    the context.

    Several processes may use one folder: reading takes no lock, and entries are written atomically. Each entry has a
    checksum; one that is truncated, altered or misplaced is reported, computed again and replaced.

    Note that a limit below the size of the data set helps little: each epoch evicts what the next one reads first.

    Args:
        path: The folder; created by the first write.
        dtype: Of stored values: 'float16', 'bfloat16', 'float32', or 'int8' with one scale for each channel of each
            map, with errors of at most 1/254 of the channel's largest magnitude.
        max_size: Limit of the entries together, in bytes or as in '20GB' (10^9 bytes each), kept by deleting the least
            recently used; None is no limit. All users of a folder should agree on it.

    Attributes:
        counts: Hits, misses and other counts of this process; logged after 100, 1000, 10000, ... images.

    Raises:
        ValueError: Unknown dtype or malformed size.
    """

    def __init__(self, path: str | Path, dtype: str = 'float16', max_size: int | str | None = None) -> None:
        if dtype not in DTYPES:
            raise ValueError(f'cache dtype is {dtype!r}; it is one of {", ".join(DTYPES)}')
        self.path = Path(path).expanduser()
        self.dtype = dtype
        self.max_size = None if max_size is None else parse_size(max_size)
        self.counts = CacheCounts()
        self._cleaned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> 'FeatureCache':
        """A copied model uses the same folder, and the same counts."""
        return self

    def fetch(
        self,
        images: Tensor,
        context: Mapping[str, Any],
        compute: Callable[..., Sequence[Tensor]],
        names: Sequence[str] = (),
        per_image: Sequence[Any] | None = None,
    ) -> tuple[Tensor, ...]:
        """Read the maps of cached images; compute and store those of the others.

        Computed maps are converted to the storage dtype and back, so that first and later runs agree.

        Args:
            images: With shape (B, 3, H, W), or with more channels: all bytes count.
            context: Everything else that maps depend on, except autocast; ready for JSON.
            compute: Turns images (b, 3, H, W) into maps (b, C, h, w), without gradients. Called at most once.
            names: Of the first maps, for error messages.
            per_image: Additional input for each image that its maps depend on, such as its prompt, ready for JSON;
                `compute` then gets those of its images as second argument.

        Returns:
            Maps (B, C, h, w) in the dtype and on the device of the images.

        Raises:
            ValueError: Images require gradients, values overflow the storage dtype, or an entry is larger than the
                limit.
        """
        if images.requires_grad and torch.is_grad_enabled():
            raise ValueError('images require gradients, which cached activations do not have; switch the cache off')
        paths = [self._path(key) for key in self.keys(images, context, per_image)]
        entries = [self._read(path) for path in paths]
        missing = [i for i, entry in enumerate(entries) if entry is None]
        if missing:
            arguments = [images if len(missing) == len(images) else images[missing]]
            if per_image is not None:
                arguments.append([per_image[i] for i in missing])
            with torch.no_grad():
                maps = compute(*arguments)
            for i, entry in zip(missing, self._pack(maps, names), strict=True):
                self._write(paths[i], entry)
                entries[i] = entry
        self._count(len(images) - len(missing), len(missing))
        stacked = {name: _stack([entry[name] for entry in entries]).to(images.device) for name in entries[0]}
        numbers = [str(i) for i in range(len(stacked)) if str(i) in stacked]
        return tuple(dequantize(stacked[i], stacked.get(SCALE.format(i))).to(images.dtype) for i in numbers)

    def keys(self, images: Tensor, context: Mapping[str, Any], per_image: Sequence[Any] | None = None) -> list[str]:
        """Keys of the entries of images (B, C, H, W); arguments as in `fetch`."""
        device = images.device.type
        autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        all_else = [__version__, VALUES, self.dtype, autocast, context]
        common = hashlib.sha256(json.dumps(all_else, sort_keys=True).encode())
        keys = []
        extras = [None] * len(images) if per_image is None else per_image
        for image, extra in zip(images.detach().cpu().contiguous(), extras, strict=True):
            digest = common.copy()
            digest.update(json.dumps([extra, str(image.dtype), list(image.shape)], sort_keys=True).encode())
            digest.update(_bytes(image))
            keys.append(digest.hexdigest())
        return keys

    def entries(self) -> Iterator[Path]:
        """The files of all entries."""
        return self.path.glob('??/*.safetensors')

    def size(self) -> int:
        """Bytes of all entries, from a new listing."""
        return sum(size for _, size, _ in self._listed())

    def prune(self, limit: int) -> None:
        """Delete the least recently used entries until the others take at most `limit` bytes."""
        if self.path.is_dir():
            with self._lock():
                self._set_used(self._evict(limit))

    def _path(self, key: str) -> Path:
        return self.path / key[:2] / f'{key}.safetensors'

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        """Read an entry and mark it as used; None if it is missing or damaged."""
        try:
            entry = read_entry(path)
        except FileNotFoundError:  # never written, or evicted
            return None
        except DamagedEntryError as error:
            self.counts.damaged += 1
            print_log(f'feature cache: {error}; it is computed again', 'current', WARNING)
            return None
        with suppress(OSError):  # evicted, or owned by another user
            os.utime(path)
        return entry

    def _count(self, hits: int, misses: int) -> None:
        before = self.counts.hits + self.counts.misses
        self.counts.hits += hits
        self.counts.misses += misses
        if before + hits + misses >= 10 ** max(2, len(str(before))):
            print_log(f'feature cache {self.path}: {self.counts}', 'current')

    def _pack(self, maps: Sequence[Tensor], names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Each image's tensors on the CPU as they are stored, of maps (b, C, h, w)."""
        packed: dict[str, Tensor] = {}
        for i, x in enumerate(maps):
            packed[str(i)], scale = quantize(x) if self.dtype == 'int8' else (x.to(DTYPES[self.dtype]), None)
            if scale is not None:
                packed[SCALE.format(i)] = scale
            if not (packed[str(i)] if scale is None else scale).isfinite().all():
                raise ValueError(
                    f'{names[i] if i < len(names) else f"map {i}"} has a value of {x.abs().max():.4g}, which '
                    f"{self.dtype} cannot represent; cache finite values, with dtype 'bfloat16', 'float32' or 'int8'"
                )
        packed = {name: tensor.cpu() for name, tensor in packed.items()}
        for i in range(len(maps[0])):
            yield {name: tensor[i].contiguous() for name, tensor in packed.items()}

    def _write(self, path: Path, entry: Mapping[str, Tensor]) -> None:
        data = save(dict(entry), {'checksum': _checksum(path.stem, entry)})
        if self.max_size is not None and len(data) > self.max_size:
            raise ValueError(f'an entry of {format_size(len(data))} exceeds max_size={format_size(self.max_size)}')
        with ExitStack() as locked:
            with whole_file(path, self._partial) as partial:
                partial.write_bytes(data)  # without the lock, so that several processes write at a time
                locked.enter_context(self._lock())
                used = self._used()
                if self.max_size is not None and used + len(data) > self.max_size:
                    used = self._evict(max(0, int(LOW_WATER * self.max_size) - len(data)))
                self._set_used(used + len(data))  # before the rename: too large, not too small, if a process is killed
        if not self._cleaned:
            self._clean()

    @property
    def _partial(self) -> Path:
        return self.path / '.partial'

    def _clean(self) -> None:
        """Delete incomplete files of killed processes, once per process."""
        self._cleaned = True
        remove_abandoned(self._partial.iterdir())

    def _lock(self) -> Any:
        """Context manager that excludes writes and evictions of other processes; a killed process loses its lock."""
        return FileLock(self.path / '.lock').acquire(poll_interval=POLL)

    def _used(self) -> int:
        try:
            return int((self.path / '.size').read_text())
        except (FileNotFoundError, ValueError):  # the first writer, or a writer was killed
            return self.size()

    def _set_used(self, size: int) -> None:
        (self.path / '.size').write_text(str(size))

    def _listed(self) -> list[tuple[int, int, Path]]:
        """Time of the last use, in ns, and bytes of all entries."""
        entries = []
        for path in self.entries():
            with suppress(FileNotFoundError):
                stat = path.stat()
                entries.append((stat.st_mtime_ns, stat.st_size, path))
        return entries

    def _evict(self, limit: int) -> int:
        """Delete entries down to `limit` bytes; returns the bytes left."""
        entries = sorted(self._listed())
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= limit:
                break
            path.unlink(missing_ok=True)
            total -= size
            self.counts.evicted += 1
        return total


def build_cache(cache: str | Path | Mapping[str, Any] | None) -> FeatureCache | None:
    """Build a cache from its config: a folder, arguments of `FeatureCache`, or None for no cache."""
    if cache is None:
        return None
    return FeatureCache(**cache) if isinstance(cache, Mapping) else FeatureCache(cache)


def read_entry(path: Path) -> dict[str, Tensor]:
    """Read the tensors of an entry.

    Raises:
        FileNotFoundError: The entry does not exist.
        DamagedEntryError: The content is not what was written under this name.
    """
    data = path.read_bytes()  # no memory map: an evicted file must not crash the process
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])
        expected = header['__metadata__']['checksum']
    except (SafetensorError, KeyError, ValueError) as error:
        raise DamagedEntryError(f'{path} is damaged ({error})') from error
    if _checksum(path.stem, tensors) != expected:
        raise DamagedEntryError(f'{path} is damaged (its checksum is that of other content)')
    return tensors


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (..., C, h, w) as int8 and their scales, float32 (..., C, 1, 1)."""
    x = x.float()
    scale = x.abs().amax((-2, -1), keepdim=True) / 127
    return (x / scale.clamp(min=torch.finfo(scale.dtype).tiny)).round().to(torch.int8), scale


def dequantize(values: Tensor, scale: Tensor | None) -> Tensor:
    """Invert `quantize`; without a scale, the values themselves."""
    return values if scale is None else values * scale


def entry_size(shapes: Sequence[tuple[int, int, int]], dtype: str) -> int:
    """Size in bytes, to within a few hundred, of an entry with maps of these shapes (C, h, w)."""
    values = sum(c * h * w for c, h, w in shapes)
    scales = sum(c for c, _, _ in shapes) if dtype == 'int8' else 0
    tensors = len(shapes) * (2 if scales else 1)
    return values * DTYPES[dtype].itemsize + scales * torch.float32.itemsize + HEADER[0] + HEADER[1] * tensors


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 500, '500MB' or '1.5 TB', with units of powers of 1000.

    Raises:
        ValueError: The text is not a size, or the size is not positive.
    """
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    match = re.fullmatch(r'(\d+(?:\.\d*)?)\s*([a-z]*)', str(size).strip().lower())
    factor = units.get(match[2] or 'b') if match else None
    count = int(float(match[1]) * factor) if factor else 0
    if count < 1:
        raise ValueError(f'{size!r} is not a size; give bytes, or a number with {", ".join(UNITS)}')
    return count


def format_size(size: int) -> str:
    """A size with three digits and a unit."""
    unit = next((unit for unit in reversed(UNITS) if size >= 0.9995 * UNITS[unit]), 'B')  # 999 600 B round to 1 MB
    value = size / UNITS[unit]
    return f'{value:.3g} {unit}' if value < 999.5 else f'{value:.0f} {unit}'


def _checksum(key: str, tensors: Mapping[str, Tensor]) -> str:
    """Digest of an entry's name and content."""
    digest = hashlib.sha256(key.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack` without autocast, which would change the dtype (and does not support float16 on a CPU)."""
    stacked = tensors[0].new_empty(len(tensors), *tensors[0].shape)
    for row, tensor in zip(stacked, tensors, strict=True):
        row.copy_(tensor)
    return stacked


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())

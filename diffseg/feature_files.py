"""Activations on disk: one safetensors file for each image, and `config.json` with the configuration."""

import collections
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffseg.diffusion.images import SUFFIXES
from diffseg.files import whole_file

DTYPES = {name: getattr(torch, name) for name in ('float32', 'float16', 'bfloat16')}


class Item(NamedTuple):
    """An image and its path relative to the root, which names its output."""

    path: Path
    name: str

    def output(self, out: Path) -> Path:
        """Path of its activations in the folder `out`."""
        return out / f'{self.name}.safetensors'


def find_images(source: Path, root: Path) -> tuple[list[Item], collections.Counter[str]]:
    """List the images to read, sorted by name.

    A folder is searched for files with the suffix of an image; every line of a list is used.

    Returns:
        The images, and the number of other files in the folder by suffix. Hidden files are ignored.

    Raises:
        ValueError: there are no images, or a path is outside of the root.
    """
    others: collections.Counter[str] = collections.Counter()
    if source.is_dir():
        paths = []
        for path in source.rglob('*'):
            if path.is_file() and not any(part.startswith('.') for part in path.relative_to(source).parts):
                if path.suffix.lower() in SUFFIXES:
                    paths.append(path)
                else:
                    others[path.suffix] += 1
    elif source.suffix == '.txt':
        paths = [source.parent / line.strip() for line in source.read_text('utf-8').splitlines() if line.strip()]
    else:
        paths = [source]
    items = set()
    for path in map(Path, map(os.path.abspath, paths)):
        if not path.is_relative_to(root):
            raise ValueError(f'{path} lies outside {root}; set --root to a folder that contains all images')
        items.add(Item(path, path.relative_to(root).as_posix()))
    if not items:
        raise ValueError(f'no images in {source}' + (f' (but {count_suffixes(others)})' if others else ''))
    return sorted(items, key=lambda item: item.name), others


def count_suffixes(others: Mapping[str, int]) -> str:
    """Numbers of files of each suffix, as text."""
    return ', '.join(f'{count} {suffix or "without suffix"}' for suffix, count in sorted(others.items()))


def check_configuration(out: Path, configuration: Mapping[str, Any]) -> None:
    """Record the configuration in a new output folder, or compare it with the recorded one.

    Raises:
        ValueError: they differ; the message names all differing keys.
    """
    path = out / 'config.json'
    out.mkdir(parents=True, exist_ok=True)
    try:
        with path.open('x', encoding='utf-8') as file:
            file.write(json.dumps(configuration, indent=2) + '\n')
        return
    except FileExistsError:
        pass
    try:
        recorded = json.loads(path.read_text('utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is not readable ({error}); delete it if no other run is just starting') from error
    old, new = dict(_flat(recorded)), dict(_flat(json.loads(json.dumps(configuration))))
    differing = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    if differing:
        details = '; '.join(f'{key}: {old.get(key)!r} there, {new.get(key)!r} here' for key in differing)
        raise ValueError(f'{out} holds features of another configuration ({details}); choose another --out')


def _flat(value: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _flat(part, f'{prefix}.{key}' if prefix else key)
    else:
        yield prefix, value


def header(item: Item, configuration: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of an image's file; a file with exactly these entries is complete and current."""
    stat = item.path.stat()
    digest = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()
    return {
        'source': item.name,
        'source_state': f'{stat.st_size} bytes, modified {stat.st_mtime_ns} ns',
        'timesteps': json.dumps(configuration['timesteps']),
        'configuration': digest,
    }


def is_complete(path: Path, expected: Mapping[str, str]) -> bool:
    """Whether a file is readable and has the expected metadata."""
    try:
        with safe_open(path, 'pt') as file:
            return expected.items() <= file.metadata().items()
    except (OSError, SafetensorError):
        return False


def write_features(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically: it gets its name when it is complete."""
    with whole_file(path) as partial:
        save_file(dict(tensors), partial, metadata)

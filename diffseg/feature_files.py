"""Activations on disk: one safetensors file for each image, and `config.json` with the configuration."""

import collections
import hashlib
import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load, save
from torch import Tensor

from diffseg.diffusion.images import SUFFIXES
from diffseg.files import locate, write_bytes

DTYPES = {name: getattr(torch, name) for name in ('float32', 'float16', 'bfloat16')}

VERSIONS = ('ETag', 'etag', 'blob_id', 'CRC', 'mtime', 'LastModified', 'last_modified', 'created')  # in fsspec's `info`


class Item(NamedTuple):
    """An image behind fsspec, and its path relative to the root, which names its output."""

    fs: AbstractFileSystem
    path: str
    name: str

    def content(self) -> bytes:
        """Bytes of the file.

        Raises:
            OSError: It cannot be read.
        """
        try:
            return self.fs.cat_file(self.path)
        except OSError:
            raise
        except Exception as error:  # file systems of fsspec raise many types
            raise OSError(f'{self.path}: cannot be read ({error})') from error

    def state(self) -> str:
        """What changes with the file: its size, and its time of modification or what else a store says of its content.

        Raises:
            OSError: There is no such file.
        """
        if isinstance(self.fs, LocalFileSystem):
            stat = os.stat(self.path)
            return f'{stat.st_size} bytes, modified {stat.st_mtime_ns} ns'
        info = self.fs.info(self.path)
        version = next((f', {key} {info[key]}' for key in VERSIONS if info.get(key)), '')
        return f'{info["size"]} bytes{version}'

    def output(self, folder: str) -> str:
        """Path of its activations in a folder."""
        return f'{folder.rstrip("/")}/{self.name}.safetensors'


def find_images(
    source: str | Path, root: str | Path | None = None, suffixes: Set[str] = SUFFIXES
) -> tuple[list[Item], collections.Counter[str], str]:
    """List the images to read, sorted by name.

    A folder is searched for files with a suffix of `suffixes`; every line of a list (`.txt`) is used: an absolute path,
    one relative to the list, or a URL.

    Args:
        source: A folder, a list, or one image: a local path, or a URL of fsspec such as `s3://bucket/photos` or
            `zip://photos::photos.zip`.
        root: Folder to which names are relative; None is the source's folder.
        suffixes: Of images, or also of other files that hold images.

    Returns:
        The images, the number of other files in the folder by suffix, and the root, absolute. Hidden files are ignored.

    Raises:
        ValueError: There are no images, or a path is outside of the root.
    """
    fs, path = locate(source)
    is_folder = fs.isdir(path)
    root_fs, folder = (fs, path if is_folder else posixpath.dirname(path)) if root is None else locate(root)
    root_url = folder
    if not isinstance(root_fs, LocalFileSystem):
        _, *archives = str(source if root is None else root).split('::')
        root_url = '::'.join([root_fs.unstrip_protocol(folder), *archives])

    others: collections.Counter[str] = collections.Counter()
    if is_folder:
        files = []
        for file, info in fs.find(path, detail=True).items():
            if not any(part.startswith('.') for part in _below(file, path).split('/')):
                if posixpath.splitext(file)[1].lower() not in suffixes:
                    others[posixpath.splitext(file)[1]] += 1
                elif info['type'] == 'file' or fs.isfile(file):  # not a link to nothing, or to a folder
                    files.append((fs, file))
    elif path.endswith('.txt'):
        lines = filter(None, map(str.strip, fs.cat_file(path).decode().splitlines()))
        parent = posixpath.dirname(path)
        files = [locate(line) if '://' in line else (fs, posixpath.join(parent, line)) for line in lines]
    else:
        files = [(fs, path)]

    items = set()
    for file_fs, file in files:
        if isinstance(file_fs, LocalFileSystem):
            file = os.path.abspath(file)
        name = _below(file, folder)
        if file_fs != root_fs or name is None:
            raise ValueError(f'{file} lies outside {root_url}; set --root to a folder that contains all images')
        items.add(Item(file_fs, file, name))
    if not items:
        raise ValueError(f'no images in {source}' + (f' (but {count_suffixes(others)})' if others else ''))
    return sorted(items, key=lambda item: item.name), others, root_url


def _below(path: str, folder: str) -> str | None:
    """Path relative to a folder; None outside of it."""
    prefix = folder.rstrip('/') + '/'
    if not folder.strip('/'):
        return path.lstrip('/')
    return path.removeprefix(prefix) if path.startswith(prefix) else None


def count_suffixes(others: Mapping[str, int]) -> str:
    """Numbers of files of each suffix, as text."""
    return ', '.join(f'{count} {suffix or "without suffix"}' for suffix, count in sorted(others.items()))


def check_configuration(out: str | Path, configuration: Mapping[str, Any]) -> None:
    """Record the configuration in a new output folder, local or behind fsspec, or compare it with the recorded one.

    Raises:
        ValueError: they differ; the message names all differing keys.
    """
    fs, folder = locate(out)
    path = f'{folder.rstrip("/")}/config.json'
    text = json.dumps(configuration, indent=2) + '\n'
    if isinstance(fs, LocalFileSystem):
        fs.makedirs(folder, exist_ok=True)
        try:
            with open(path, 'x', encoding='utf-8') as file:
                file.write(text)
            return
        except FileExistsError:
            pass
    elif not fs.exists(path):
        write_bytes(fs, path, text.encode())
        return
    try:
        recorded = json.loads(fs.cat_file(path))
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
    """Metadata of an image's file; a file with exactly these entries is complete and current.

    Raises:
        OSError: There is no such image.
    """
    return metadata(item.name, item.state(), configuration)


def metadata(name: str, state: str, configuration: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of an image's activations.

    Args:
        name: Of the image.
        state: Of the file that it is read from, see `Item.state`.
        configuration: Of the run.
    """
    digest = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()
    return {
        'source': name,
        'source_state': state,
        'timesteps': json.dumps(configuration['timesteps']),
        'configuration': digest,
    }


def is_complete(fs: AbstractFileSystem, path: str, expected: Mapping[str, str]) -> bool:
    """Whether a file is whole and has the expected metadata."""
    try:
        size = fs.size(path)
        with fs.open(path, 'rb') as file:
            length = int.from_bytes(file.read(8), 'little')
            described = json.loads(file.read(min(length, size)))
        metadata = described.pop('__metadata__')
        end = max(tensor['data_offsets'][1] for tensor in described.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # absent, cut, or another format
        return False
    return size == 8 + length + end and expected.items() <= metadata.items()


def features_to_bytes(activations: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Content of a safetensors file with an image's activations {layer: (T, C, h, w)} and its `header`."""
    return save(dict(activations), dict(metadata))


def features_from_bytes(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Invert `features_to_bytes`.

    Raises:
        SafetensorError: `data` is no such content.
    """
    activations = load(data)
    described = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])
    return activations, described.get('__metadata__', {})


def write_features(path: str | Path, activations: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `features_to_bytes`, locally or behind fsspec; the file is complete or absent."""
    write_bytes(*locate(path), features_to_bytes(activations, metadata))

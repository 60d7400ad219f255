"""Images in shards, and their activations in shards: tar files in WebDataset's layout, and Parquet.

```text
OUT/config.json                 the configuration
OUT/features-RUN-000000.tar     __index__, and NAME.safetensors for each of its images
OUT/features-RUN-000001.tar     ...
```

or `.parquet` with the columns `name`, `source_state` and `features`. A shard gets its name when it is complete. The
bytes of an image's activations are those of its file in `diffseg.feature_files`, and it has the same name.
"""

import io
import json
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fsspec import AbstractFileSystem
from torch import Tensor

from diffseg.diffusion.images import SUFFIXES
from diffseg.feature_files import Item, features_from_bytes
from diffseg.files import locate

SHARDS = frozenset(('.tar', '.parquet'))
FORMATS = {'webdataset': '.tar', 'parquet': '.parquet'}
INDEX = '__index__'  # readers of WebDataset skip members that are named like this
EXTENSION = '.safetensors'
ROWS = 16  # of a Parquet file, read at a time
THREADS = 16  # that read indices


Failure = tuple[str, str]  # name of an image or file, and the reason


class File(NamedTuple):
    """A file with images, see `read_pictures`: its state, and the names of those of them that are done."""

    path: str
    name: str
    state: str
    done: Sequence[str] = ()


class Picture(NamedTuple):
    """Content of an image file, or why there is none."""

    name: str
    content: bytes | None
    error: str | None = None


class Features(NamedTuple):
    """Content of an image's safetensors file, the image's name, and the state of the file that it was read from."""

    name: str
    source_state: str
    features: bytes


def is_shard(path: str) -> bool:
    """Whether a file holds images, by its suffix."""
    return posixpath.splitext(path)[1].lower() in SHARDS


def list_files(items: Sequence[Item], done: Mapping[str, str]) -> tuple[list[File], list[Failure]]:
    """List the files that may hold images which are not done.

    Args:
        items: All files: images and shards.
        done: As from `list_features`.

    Returns:
        The files, and which do not exist.

    Raises:
        ValueError: A file has changed since images of it were done.
    """

    def read_state(item: Item) -> str | OSError:
        try:
            return item.state()
        except OSError as error:
            return error

    of_file: dict[str, list[str]] = {item.name: [] for item in items}
    for name in done:
        file = name
        while file not in of_file and file:
            file = posixpath.dirname(file)
        of_file.get(file, []).append(name)
    files: list[File] = []
    failures: list[Failure] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for item, state in zip(items, pool.map(read_state, items), strict=True):
            names = of_file[item.name]
            if isinstance(state, OSError):
                failures.append((item.name, str(state)))
            elif any(done[name] != state for name in names):
                raise ValueError(f'{item.path} has changed since its features were written; choose another --out')
            elif is_shard(item.path) or not names:
                files.append(File(item.path, item.name, state, names))
    return files, failures


def read_pictures(
    fs: AbstractFileSystem, path: str, name: str, done: Set[str] = frozenset(), column: str = 'image'
) -> Iterator[Picture]:
    """Read the images of a file.

    An image file holds itself. The members of a tar file that have the suffix of an image are named `name/member`, and
    row 17 of a Parquet file is `name/17`. What cannot be read is yielded as an error, of the image or of the file, and
    the reading goes on behind it where that is possible.

    Args:
        fs: File system of the file.
        path: Of an image, a tar file or a Parquet file.
        name: Of the file.
        done: Names of images to leave out.
        column: Of a Parquet file: bytes, or as in data sets of Hugging Face a structure with the field `bytes`.
    """
    suffix = posixpath.splitext(path)[1].lower()
    try:
        with fs.open(path, 'rb') as file:
            if suffix == '.tar':
                yield from _read_tar(file, name, done)
            elif suffix == '.parquet':
                yield from _read_parquet(file, name, done, column)
            elif name not in done:
                yield Picture(name, file.read())
    except Exception as error:  # tarfile, pyarrow and file systems raise many types on damaged files
        yield Picture(name, None, f'{path}: cannot be read ({error})')


def _read_tar(file: BinaryIO, name: str, done: Set[str]) -> Iterator[Picture]:
    names = set()
    with tarfile.open(fileobj=file, mode='r:') as archive:
        for member in archive:
            archive.members.clear()  # or it would hold the headers of all
            picture = f'{name}/{member.name}'
            if not member.isreg() or posixpath.splitext(member.name)[1].lower() not in SUFFIXES or picture in done:
                continue
            if picture in names:
                yield Picture(picture, None, f'{name} has another image of this name before')
                continue
            names.add(picture)
            yield Picture(picture, archive.extractfile(member).read())
        end = archive.offset
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # a damaged header ends the iteration without an error
        raise ValueError(f'damaged or truncated: at byte {end} is neither a member nor the end of the archive')


def _read_parquet(file: BinaryIO, name: str, done: Set[str], column: str) -> Iterator[Picture]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(file)
    if column not in table.schema_arrow.names:
        raise ValueError(f'no column {column!r}, but {", ".join(table.schema_arrow.names)}; set --image-column')
    row = 0
    for group in range(table.num_row_groups):
        end = row + table.metadata.row_group(group).num_rows
        try:
            for batch in table.iter_batches(ROWS, [group], [column]):
                for value in batch.column(0).to_pylist():
                    picture = f'{name}/{row}'
                    row += 1
                    if picture not in done:
                        content = value['bytes'] if isinstance(value, dict) else value
                        yield Picture(picture, content, None if content else f'no bytes in column {column!r}')
        except (OSError, pyarrow.ArrowException) as error:
            yield Picture(name, None, f'rows {row} to {end - 1} cannot be read ({error})')
            row = end


def shard_to_bytes(rows: Sequence[Features], suffix: str) -> bytes:
    """Content of a shard in the format of a suffix, `.tar` or `.parquet`."""
    data = io.BytesIO()
    if suffix == '.parquet':
        import pyarrow
        from pyarrow import parquet

        schema = pyarrow.schema([('name', 'string'), ('source_state', 'string'), ('features', 'large_binary')])
        table = pyarrow.Table.from_pylist([row._asdict() for row in rows], schema)
        parquet.write_table(table, data, compression='none')
        return data.getvalue()
    index = {row.name: row.source_state for row in rows}
    with tarfile.open(fileobj=data, mode='w') as archive:
        for name, content in [(INDEX, json.dumps(index).encode()), *((r.name + EXTENSION, r.features) for r in rows)]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def list_features(folder: str | Path) -> dict[str, str]:
    """Names of all images whose activations are in the shards of a folder, and the states of their files.

    Args:
        folder: Local, or behind fsspec.

    Raises:
        ValueError: A shard is none of features, or an image is in two.
    """
    fs, shards = _shards(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        indices = list(pool.map(lambda path: _read_index(fs, path), shards))
    states = {}
    for path, index in zip(shards, indices, strict=True):
        if twice := states.keys() & index.keys():
            raise ValueError(f'{path} holds {min(twice)}, which is in another shard too')
        states |= index
    return states


def read_features(folder: str | Path) -> Iterator[tuple[str, dict[str, Tensor], dict[str, str]]]:
    """Names, activations {layer: (T, C, h, w)} and metadata of all images in the shards of a folder.

    Args:
        folder: Local, or behind fsspec.
    """
    fs, shards = _shards(folder)
    for path in shards:
        with fs.open(path, 'rb') as file:
            if path.endswith('.parquet'):
                from pyarrow.parquet import ParquetFile

                for batch in ParquetFile(file).iter_batches(ROWS, columns=['name', 'features']):
                    for row in batch.to_pylist():
                        yield row['name'], *features_from_bytes(row['features'])
                continue
            with tarfile.open(fileobj=file, mode='r:') as archive:
                for member in archive:
                    archive.members.clear()
                    if member.name != INDEX:
                        data = archive.extractfile(member).read()
                        yield member.name.removesuffix(EXTENSION), *features_from_bytes(data)


def _shards(folder: str | Path) -> tuple[AbstractFileSystem, list[str]]:
    fs, path = locate(folder)
    files = fs.ls(path, detail=False) if fs.isdir(path) else []
    names = {file: posixpath.split(file)[1] for file in files}
    return fs, sorted(f for f in files if posixpath.splitext(f)[1] in SHARDS and not names[f].startswith('.'))


def _read_index(fs: AbstractFileSystem, path: str) -> dict[str, str]:
    try:
        with fs.open(path, 'rb') as file:
            if path.endswith('.parquet'):
                from pyarrow import parquet

                columns = parquet.read_table(file, columns=['name', 'source_state']).columns
                return dict(zip(*(column.to_pylist() for column in columns), strict=True))
            with tarfile.open(fileobj=file, mode='r:') as archive:
                first = archive.next()
                if first is None or first.name != INDEX:
                    raise ValueError(f'does not begin with {INDEX}')
                return json.load(archive.extractfile(first))
    except Exception as error:
        raise ValueError(f'{path} is no shard of features ({error}); delete it, or choose another --out') from error

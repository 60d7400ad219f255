"""Atomic writes: files are complete or absent, also with concurrent or killed writers; and paths of fsspec."""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

PARTIAL = '.partial'  # suffix of temporary files
ABANDONED = 3600  # seconds after which a temporary file is that of a killed process


@contextmanager
def whole_file(path: str | Path, folder: str | Path | None = None) -> Iterator[Path]:
    """Write a temporary file that is renamed to `path` when the block ends without an error.

    ```python
    with whole_file('result.json') as partial:
        partial.write_text(...)
    ```

    Permissions follow the umask, as for any new file.

    Args:
        path: of the file; missing folders are created.
        folder: of the temporary file, on the same file system; by default that of the file.

    Yields:
        The path of the temporary file, unique to this writer.
    """
    path = Path(path)
    folder = path.parent if folder is None else Path(folder)
    for parent in (path.parent, folder):
        parent.mkdir(parents=True, exist_ok=True)
    partial = folder / f'.{path.name}.{token_hex(8)}{PARTIAL}'
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_abandoned(paths: Iterable[str | Path]) -> None:
    """Delete those of the files that writers which were killed left incomplete."""
    for path in map(Path, paths):
        if path.name.startswith('.') and path.suffix == PARTIAL:
            with suppress(FileNotFoundError):  # completed, or deleted by another process
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()


def locate(url: str | Path) -> tuple[AbstractFileSystem, str]:
    """Split a URL of fsspec, such as `s3://bucket/folder`, or a local path into its file system and the path there.

    Local paths become absolute, without `..`.

    Raises:
        ValueError: fsspec knows no such protocol.
        ImportError: The protocol needs a package that is not installed, which the message names.
    """
    fs, path = (LocalFileSystem(), str(url)) if isinstance(url, Path) else url_to_fs(url)
    return fs, Path(os.path.abspath(path)).as_posix() if isinstance(fs, LocalFileSystem) else path


def write_bytes(fs: AbstractFileSystem, path: str, data: bytes) -> None:
    """Write a file that is complete or absent: locally as `whole_file` does, elsewhere in one put."""
    if isinstance(fs, LocalFileSystem):
        with whole_file(path) as partial:
            partial.write_bytes(data)
        return
    try:
        fs.pipe_file(path, data)
    except FileNotFoundError:  # not an object store: its folders must exist
        fs.makedirs(fs._parent(path), exist_ok=True)
        fs.pipe_file(path, data)

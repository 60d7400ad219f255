"""Atomic writes: files are complete or absent, also with concurrent or killed writers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex


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
    partial = folder / f'.{path.name}.{token_hex(8)}.partial'
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

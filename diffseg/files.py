"""Files that are whole or absent, whoever else writes them and whenever a writer is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex


@contextmanager
def whole_file(path: str | Path, folder: str | Path | None = None) -> Iterator[Path]:
    """Write a file under another name, which becomes its own when the block ends without an error.

    ```python
    with whole_file('result.json') as partial:
        partial.write_text(...)
    ```

    Permissions are those of any new file, by the umask.

    Args:
        path: of the file; its folder is made where it is missing.
        folder: where to write, on the same file system; by default beside the file.

    Yields:
        A path that no other writer has.
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

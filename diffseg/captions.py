"""Captions of images from a JSON file."""

import json
from collections.abc import Mapping
from pathlib import Path


class Captions:
    """Captions of images from a JSON file {image name: caption}, numbered by row.

    An image's name is that of its file; if files in several folders share a name, it is preceded by as many folders as
    make it unique (`horse/1.jpg`). If several names match a path, the longest is used.

    Args:
        file: the JSON file.

    Attributes:
        texts: captions in the order of the file.

    Raises:
        OSError: the file does not exist.
        ValueError: the file has other content.
    """

    def __init__(self, file: str | Path):
        self.file = str(file)
        try:
            content = json.loads(Path(file).expanduser().read_text(encoding='utf-8'))
        except ValueError as error:
            raise ValueError(f'{file} is not JSON: {error}') from error
        if not isinstance(content, Mapping) or not content:
            raise ValueError(f'{file} holds no captions; it is {{"image name": "caption", ...}}')
        if wrong := [name for name, text in content.items() if not isinstance(text, str)]:
            raise ValueError(f'{file}: the caption of {wrong[0]!r} is {content[wrong[0]]!r}, which is not text')
        self.texts: list[str] = list(content.values())
        self._rows = {name: row for row, name in enumerate(content)}

    def row(self, path: str | Path | None) -> int:
        """The row of an image's caption.

        Raises:
            ValueError: the image has no caption.
        """
        parts = Path(path).parts if path is not None else ()
        for start in range(len(parts)):
            if (row := self._rows.get('/'.join(parts[start:]))) is not None:
                return row
        raise ValueError(f'no caption for the image {str(path)!r} in {self.file}; add one under the name of its file')

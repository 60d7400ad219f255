"""Captions of images, one for each, from a file."""

import json
from collections.abc import Mapping
from pathlib import Path


class Captions:
    """Captions, each in a row of its own, of the images in a JSON file {image name: caption}.

    An image's name is that of its file; where folders hold files of the same name, as much of the path as tells them
    apart stands before it (`horse/1.jpg`). If several names fit a path, the longest does.

    Args:
        file: The JSON file.

    Attributes:
        texts: Captions in the order of the file.

    Raises:
        OSError: There is no such file.
        ValueError: The file holds something else.
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
            raise ValueError(f'{file}: the caption of {wrong[0]!r} is {content[wrong[0]]!r}, which is no text')
        self.texts: list[str] = list(content.values())
        self._rows = {name: row for row, name in enumerate(content)}

    def row(self, path: str | Path | None) -> int:
        """The row of an image's caption.

        Raises:
            ValueError: There is none.
        """
        parts = Path(path).parts if path is not None else ()
        for start in range(len(parts)):
            if (row := self._rows.get('/'.join(parts[start:]))) is not None:
                return row
        raise ValueError(f'no caption for the image {str(path)!r} in {self.file}; add one under the name of its file')

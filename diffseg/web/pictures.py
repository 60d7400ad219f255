"""The folder of pictures that the explorer shows."""

import hashlib
import io
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffseg.diffusion.images import ROTATED, SUFFIXES, open_image
from diffseg.files import whole_file
from diffseg.geometry import Size

FORMATS = {'BMP': '.bmp', 'GIF': '.gif', 'JPEG': '.jpg', 'PNG': '.png', 'PPM': '.ppm', 'TIFF': '.tif', 'WEBP': '.webp'}
ORIENTATION = 0x0112  # of EXIF
NAME = re.compile(r'[^\x00-\x1f/\\:*?"<>|.][^\x00-\x1f/\\:*?"<>|]{0,119}')
SHOWN, THUMBNAIL = 1600, 256  # longest side, in pixels, of what the page shows
KEPT = 512  # encoded pictures in memory


class TooLargeError(ValueError):
    """A picture, or the body of a request, exceeds a limit."""


@dataclass(frozen=True)
class Picture:
    """A picture file.

    Attributes:
        id: digest of its name, by which requests name it.
        path: the file.
        size: height and width in pixels, its EXIF orientation applied; (0, 0) if it cannot be used.
        error: why it cannot be used; None if it can.
    """

    id: str
    path: Path
    size: Size = (0, 0)
    error: str | None = None

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.name


class PictureFolder:
    """The pictures directly in one folder; nothing outside of it is read or written.

    Args:
        path: the folder.
        max_bytes: largest file that is added.
        max_pixels: a picture with more is not decoded.

    Raises:
        NotADirectoryError: there is no such folder.
    """

    def __init__(self, path: str | Path, max_bytes: int = 50_000_000, max_pixels: int = 50_000_000) -> None:
        self.path = Path(path).resolve()
        if not self.path.is_dir():
            raise NotADirectoryError(f'{path} is not a folder; give the folder that holds the pictures')
        self.max_bytes = max_bytes
        self.max_pixels = max_pixels
        self._lock = threading.Lock()
        self._shown: dict[tuple[str, int], tuple[bytes, str]] = {}
        self.pictures: dict[str, Picture] = {}
        for file in sorted(self.path.iterdir(), key=lambda file: file.name):
            if file.suffix.lower() in SUFFIXES and not file.name.startswith('.') and file.is_file():
                self._register(file)

    def __getitem__(self, key: str) -> Picture:
        """The picture of this id.

        Raises:
            KeyError: there is none.
        """
        try:
            return self.pictures[key]
        except KeyError:
            raise KeyError(f'no picture has the id {key!r}; reload the page') from None

    def usable(self) -> list[Picture]:
        """All pictures that can be decoded, in the order of their names."""
        return [picture for picture in list(self.pictures.values()) if picture.error is None]

    def add(self, name: str, data: bytes) -> Picture:
        """Check a picture and write it into the folder, under another name if there is a file of this one.

        Args:
            name: of the file, without folders.
            data: its bytes.

        Raises:
            TooLargeError: too many bytes or pixels.
            ValueError: another name than that of a visible file in one folder, or no whole picture of a known format.
        """
        if not NAME.fullmatch(name):
            raise ValueError(f'{name[:80]!r} is no name of a picture; it has no folders and no leading dot')
        if len(data) > self.max_bytes:
            raise TooLargeError(f'{name}: {len(data)} bytes, at most {self.max_bytes} are taken')
        suffix = FORMATS[self._check(io.BytesIO(data), name)[1]]
        open_image_bytes(data, name)  # to the last pixel
        stem = Path(name).stem
        with self._lock:
            number, path = 1, self.path / f'{stem}{suffix}'
            while path.exists():
                number += 1
                path = self.path / f'{stem}-{number}{suffix}'
            with whole_file(path) as partial:
                partial.write_bytes(data)
            return self._register(path)

    def read(self, picture: Picture) -> Image.Image:
        """The picture as RGB, its EXIF orientation applied.

        Raises:
            ValueError: it cannot be used, or no longer.
        """
        if picture.error is not None:
            raise ValueError(picture.error)
        self._check(picture.path, picture.name)  # again: the file may have been replaced
        image = open_image(picture.path)
        if (image.height, image.width) != picture.size:
            raise ValueError(f'{picture.name}: the file has changed; start the explorer again')
        return image

    def tensor(self, picture: Picture) -> Tensor:
        """The picture as a batch of one, (1, 3, H, W) in [-1, 1], bit by bit as mmseg's data preprocessor makes it."""
        pixels = torch.from_numpy(np.array(self.read(picture))).permute(2, 0, 1)[None]
        return (pixels.float() - 127.5) / 127.5

    def encoded(self, picture: Picture, side: int) -> tuple[bytes, str]:
        """The picture as a file for the page, at most `side` pixels long, and its media type."""
        key = picture.id, side
        if key not in self._shown:
            image = self.read(picture)
            kind = 'PNG' if max(image.size) <= THUMBNAIL else 'JPEG'  # artefacts show in small pictures
            image.thumbnail((side, side))
            file = io.BytesIO()
            image.save(file, kind, quality=90)
            encoded = file.getvalue(), f'image/{kind.lower()}'
            with self._lock:
                if len(self._shown) >= KEPT:
                    self._shown.pop(next(iter(self._shown)))
                self._shown[key] = encoded
            return encoded
        return self._shown[key]

    def _register(self, path: Path) -> Picture:
        key = hashlib.sha256(path.name.encode()).hexdigest()[:16]
        try:
            if not path.resolve().is_relative_to(self.path):
                raise ValueError(f'{path.name}: is a link to a file outside of the folder')
            picture = Picture(key, path, self._check(path, path.name)[0])
        except ValueError as error:
            picture = Picture(key, path, error=str(error))
        self.pictures = dict(sorted({**self.pictures, key: picture}.items(), key=lambda item: item[1].name))
        return picture

    def _check(self, file: Any, name: str) -> tuple[Size, str]:
        """Height, width and format; nothing is decoded of a picture with too many pixels."""
        try:
            with Image.open(file, formats=list(FORMATS)) as image:
                if image.width * image.height > self.max_pixels:
                    raise TooLargeError(
                        f'{name}: {image.width} x {image.height} pixels, at most {self.max_pixels / 1e6:g} million are '
                        f'taken; make it smaller, or start with a larger --max-pixels'
                    )
                rotated = image.getexif().get(ORIENTATION) in ROTATED
                return image.size if rotated else image.size[::-1], image.format
        except TooLargeError:
            raise
        except Image.DecompressionBombError as error:
            raise TooLargeError(f'{name}: {error}') from error
        except Exception as error:  # Pillow's parsers raise many types on damaged files
            raise ValueError(f'{name}: cannot be read as a picture ({", ".join(FORMATS)})') from error


def open_image_bytes(data: bytes, name: str) -> Image.Image:
    """`open_image` of bytes; `name` is for its error."""
    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=list(FORMATS))).convert('RGB')
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise ValueError(f'{name}: is damaged or truncated ({error})') from error

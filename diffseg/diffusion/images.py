"""Image files to the tensors that the extractor takes."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = frozenset('.avif .bmp .gif .jfif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp'.split())
ROTATED = range(5, 9)  # EXIF orientations that exchange width and height


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB.

    The EXIF orientation is applied, as viewers and mmseg's loader do. Unlike DIFT, DHF and GDF, which leave such
    photographs lying on their side; for images without the tag (SPair-71k, ADE20K, ...) it is the same. Transparency is
    dropped, and of an animation the first frame is taken.

    Raises:
        ValueError: if the file cannot be read, is damaged or cut short, is no image, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except Exception as error:  # Pillow's decoders let many types escape on damaged files
        raise ValueError(f'{path}: cannot be read as an image ({error})') from error
    if image.mode == 'F' or image.mode.startswith('I'):
        raise ValueError(f'{path}: has mode {image.mode!r}; convert it to 8 bits a channel first')
    return image.convert('RGB')


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read an image file, as `open_image` does, into a tensor.

    Args:
        path: the file.
        size: (height, width) to resize to, bicubically and without keeping the aspect ratio, as DIFT and GDF do;
            None keeps the image's own size.

    Returns:
        A tensor with shape (3, H, W) in [-1, 1], float32, RGB.

    Raises:
        ValueError: as `open_image` does.
    """
    image = open_image(path)
    if size is not None and size != (image.height, image.width):
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1  # (3, H, W)


def image_size(path: str | Path) -> tuple[int, int]:
    """Read an image's (height, width) from its header, its EXIF orientation applied.

    Raises:
        ValueError: if the header cannot be read.
    """
    try:
        with Image.open(path) as file:
            rotated = file.getexif().get(0x0112) in ROTATED  # 0x0112: Orientation
            return file.size if rotated else file.size[::-1]
    except Exception as error:
        raise ValueError(f'{path}: cannot be read as an image ({error})') from error

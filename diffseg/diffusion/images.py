"""Reading of image files as tensors, and checks of such tensors."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

SUFFIXES = frozenset('.avif .bmp .gif .jfif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp'.split())
ROTATED = range(5, 9)  # EXIF orientations that exchange width and height
Interpolation = Literal['bilinear', 'bicubic']
RANGE = 1.25  # images are in [-1, 1]; bicubic resizing overshoots a little


def open_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """Read an image file as RGB.

    The EXIF orientation is applied, as viewers and mmseg's loader do. Unlike DIFT, DHF and GDF, which leave such
    photographs lying on their side; images without the tag (SPair-71k, ADE20K, ...) are the same. Transparency is
    dropped, and the first frame of an animation is read.

    Args:
        path: the file.
        content: of the file, if it has been read; `path` then only names it in errors.

    Raises:
        ValueError: the file cannot be read, is damaged or truncated, is not an image, or has more than 8 bits a
            channel.
    """
    try:
        with Image.open(path if content is None else BytesIO(content)) as file:
            image = ImageOps.exif_transpose(file)
    except UnidentifiedImageError as error:
        raise ValueError(f'{path}: cannot be read as an image (of no format that Pillow knows)') from error
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise ValueError(f'{path}: cannot be read as an image ({error})') from error
    if image.mode == 'F' or image.mode.startswith('I'):
        raise ValueError(f'{path}: has mode {image.mode!r}; convert it to 8 bits a channel first')
    return image.convert('RGB')


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read an image file, as `open_image` does, into a tensor.

    Args:
        path: the file.
        size: as in `read_pixels`.

    Returns:
        A tensor with shape (3, H, W) in [-1, 1], float32, RGB.

    Raises:
        ValueError: as `open_image` does.
    """
    return scale_pixels(read_pixels(path, size))


def read_pixels(path: str | Path, size: tuple[int, int] | None = None, content: bytes | None = None) -> Tensor:
    """Read the 8-bit values of an image file, as `open_image` does.

    Args:
        path: the file.
        size: (height, width) to resize to, bicubically and without keeping the aspect ratio, as DIFT and GDF do; None
            keeps the size.
        content: of the file, as in `open_image`.

    Returns:
        A tensor with shape (3, H, W), uint8, RGB.

    Raises:
        ValueError: as `open_image` does.
    """
    image = open_image(path, content)
    if size is not None and size != (image.height, image.width):
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W)


def scale_pixels(pixels: Tensor) -> Tensor:
    """8-bit values as what a network reads: float32 in [-1, 1], with the same bits on every device."""
    scale = torch.full((), 127.5, device=pixels.device)  # CUDA would multiply by the inverse of a number
    return pixels.float() / scale - 1


def list_images(paths: Sequence[Path]) -> list[Path]:
    """Replace each folder by the image files directly in it, sorted."""
    files: list[Path] = []
    for path in paths:
        files += sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    return files


def image_size(file: str | Path | BinaryIO) -> tuple[int, int]:
    """Read an image's (height, width) from its header, its EXIF orientation applied.

    Raises:
        ValueError: the header cannot be read.
    """
    try:
        with Image.open(file) as image:
            rotated = image.getexif().get(0x0112) in ROTATED  # 0x0112: Orientation
            return image.size if rotated else image.size[::-1]
    except Exception as error:
        raise ValueError(f'{file}: cannot be read as an image ({error})') from error


def check_images(images: Tensor, cell: int) -> None:
    """Check shape and dtype of images, not their values; does not synchronise with the device.

    Args:
        images: RGB in [-1, 1], with shape (B, 3, H, W).
        cell: side, in pixels, of the smallest image that the network accepts.

    Raises:
        ValueError: they are invalid for a network.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f'images have shape {tuple(images.shape)}; expected (B, 3, H, W)')
    if not images.is_floating_point():
        raise ValueError(f'images are {images.dtype}; expected floating point in [-1, 1], as x / 127.5 - 1 of 8 bit')
    if min(images.shape[-2:]) < cell:
        raise ValueError(
            f'images of {images.shape[-2]} x {images.shape[-1]} pixels are smaller than one cell of the network, '
            f'{cell} x {cell}; enlarge them'
        )


def check_range(low: float, high: float) -> None:
    """Check the smallest and the largest value of images.

    Raises:
        ValueError: they are not in [-1, 1], with some tolerance.
    """
    if low < -RANGE or high > RANGE:
        raise ValueError(
            f'images are in [{low:.4g}, {high:.4g}]; expected [-1, 1], as x / 127.5 - 1 of 8 bit '
            '(mean = std = 127.5 in an mmseg data preprocessor)'
        )


def extend_images(images: Tensor, multiple: int) -> Tensor:
    """Pad images (B, 3, H, W) on the right and at the bottom, to multiples of `multiple`.

    By reflection, or by the border pixels if images are too small for it.
    """
    height, width = images.shape[-2:]
    below, right = -height % multiple, -width % multiple
    mode = 'reflect' if below < height and right < width else 'replicate'
    return F.pad(images, (0, right, 0, below), mode=mode)


def resize_images(images: Tensor, size: tuple[int, int], interpolation: Interpolation = 'bilinear') -> Tensor:
    """Resize images, without keeping the aspect ratio.

    Args:
        images: in [-1, 1], with shape (B, C, H, W).
        size: (height, width) of the result.
        interpolation: 'bilinear' without antialiasing, as GDF resizes tensors; 'bicubic' as Pillow resizes 8-bit
            pictures, which DIFT and GDF do with files: with antialiasing, along rows and then along columns, and
            rounded to 8 bits after each. (Pillow 13 begins with columns where a picture becomes lower and wider.)

    Returns:
        Shape (B, C, height, width).
    """
    if interpolation == 'bilinear':
        return F.interpolate(images, size, mode='bilinear', align_corners=False)
    levels = (images + 1) * 127.5
    for partial in ((images.shape[2], size[1]), size):
        levels = F.interpolate(levels, partial, mode='bicubic', align_corners=False, antialias=True)
        levels = levels.round().clamp(0, 255)
    return levels / 127.5 - 1

"""Object masks in indexed PNG files, as in DAVIS: pixel values are object ids, the palette defines their colours."""

from pathlib import Path

import numpy as np
from PIL import Image

from .visualization import voc_palette

VOID = 255  # neither an object nor background


def davis_palette() -> np.ndarray:
    """DAVIS-2017's colours with shape (256, 3), uint8: 22 like PASCAL VOC's, of which 192 is 191, then greys."""
    palette = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    colours = voc_palette(22).numpy()
    palette[:22] = np.where(colours == 192, 191, colours)
    return palette


def read_mask(path: str | Path, shape: tuple[int, int]) -> np.ndarray:
    """Read object ids with shape (H, W), uint8.

    Args:
        path: the file.
        shape: (height, width) of the mask's frame.

    Raises:
        ValueError: the file cannot be read, is not an indexed image, or has another size than its frame.
    """
    try:
        with Image.open(path) as file:
            file.load()
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise ValueError(f'{path}: cannot be read as a mask ({error}); copy the annotation again') from error
    if file.mode != 'P':
        raise ValueError(
            f'{path}: has mode {file.mode!r}, expected an indexed image (mode "P") whose values are object ids, such '
            f"as DAVIS-2017's annotations; export it again with a palette"
        )
    mask = np.array(file)
    if mask.shape != tuple(shape):
        raise ValueError(
            f'{path}: has height and width {mask.shape}, its frame has {tuple(shape)}; take masks and frames of one '
            f'resolution'
        )
    return mask


def write_mask(path: str | Path, mask: np.ndarray) -> None:
    """Write object ids (H, W), uint8, as an indexed PNG with DAVIS's palette."""
    image = Image.fromarray(mask)
    image.putpalette(davis_palette().tobytes())
    image.save(path, 'PNG')

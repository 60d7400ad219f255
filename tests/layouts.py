"""ADE20K's and Cityscapes' folders as mmseg expects them, filled with toy pictures."""

from pathlib import Path

import numpy as np
from PIL import Image
from quadrupeds import draw_sample


def toy_picture(index: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An RGB image (height, width, 3) and its parts (height, width) from 0 to 7, both uint8."""
    sample = draw_sample(0, index, max(height, width))
    return sample.image[:height, :width], sample.mask[:height, :width].copy()


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_ade20k(root: Path, train: int = 2, val: int = 2, height: int = 48, width: int = 64) -> Path:
    """The release of 2016: labels from 1 to 150, where 0 is what nobody labelled.

    Returns:
        `data_root` of mmseg's configs.
    """
    root = root / 'ADEChallengeData2016'
    for split, short, count in (('training', 'train', train), ('validation', 'val', val)):
        for i in range(count):
            image, labels = toy_picture(i, height, width)
            labels[-1, -1] = 150
            write(root / f'images/{split}/ADE_{short}_{i + 1:08}.jpg', image)
            write(root / f'annotations/{split}/ADE_{short}_{i + 1:08}.png', labels)
    return root


def write_cityscapes(root: Path, train: int = 2, val: int = 2, height: int = 64, width: int = 128) -> Path:
    """Labels as cityscapesScripts writes them: `labelIds` up to 33, and `labelTrainIds` with 19 classes and 255.

    Returns:
        `data_root` of mmseg's configs.
    """
    root = root / 'cityscapes'
    for split, cities, count in (('train', ('aachen', 'bochum'), train), ('val', ('frankfurt',), val)):
        for i in range(count):
            image, parts = toy_picture(i, height, width)
            parts[-1, -1] = 19
            city = cities[i % len(cities)]
            stem = f'{split}/{city}/{city}_{i:06}_000019'
            write(root / f'leftImg8bit/{stem}_leftImg8bit.png', image)
            write(root / f'gtFine/{stem}_gtFine_labelIds.png', parts + 14)
            write(root / f'gtFine/{stem}_gtFine_labelTrainIds.png', parts - 1)  # 0 wraps to 255
    return root

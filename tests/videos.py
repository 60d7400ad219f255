"""Toy videos in the layouts of DAVIS-2017 and JHMDB, and one batch of a data set."""

from pathlib import Path

import numpy as np
from mmengine.dataset import pseudo_collate
from PIL import Image
from scipy.io import savemat

from diffseg.masks import write_mask

SHAPE = 32, 44


def write_davis(root: Path, videos: int = 2, frames: int = 5) -> Path:
    """Two squares that move to the right, one pixel a frame, on noise."""
    rng = np.random.default_rng(0)
    names = [f'video-{number}' for number in range(videos)]
    for name in names:
        for t in range(frames):
            mask = np.zeros(SHAPE, np.uint8)
            mask[4:14, 4 + t : 16 + t] = 1
            mask[18:28, 20 + t : 30 + t] = 2
            image = rng.integers(0, 255, (*SHAPE, 3), dtype=np.uint8)
            for kind in ('JPEGImages', 'Annotations'):
                (root / kind / '480p' / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / f'JPEGImages/480p/{name}/{t:05d}.jpg')
            write_mask(root / f'Annotations/480p/{name}/{t:05d}.png', mask)
    (root / 'ImageSets/2017').mkdir(parents=True)
    (root / 'ImageSets/2017/val.txt').write_text('\n'.join(names) + '\n')
    return root


def write_jhmdb(root: Path, frames: int = 4) -> np.ndarray:
    """One video of noise; returns its joints (T, 15, 2), counted from 0."""
    rng = np.random.default_rng(0)
    joints = rng.uniform(0, SHAPE[0], (frames, 15, 2))
    folder = root / 'Rename_Images/walk/one'
    folder.mkdir(parents=True)
    for t in range(frames):
        Image.fromarray(rng.integers(0, 255, (*SHAPE, 3), dtype=np.uint8)).save(folder / f'{t + 1:05d}.png')
    savemat(root / 'joints.mat', {'pos_img': joints.transpose(2, 1, 0) + 1})
    (root / 'test.txt').write_text('Rename_Images/walk/one joints.mat\n')
    return joints


def batch_of(dataset) -> dict:
    """All samples, as a data loader gives them."""
    return pseudo_collate([dataset[index] for index in range(len(dataset))])

"""Draw clips of toy quadrupeds into the folder layouts of DAVIS-2017 and, with --jhmdb, of JHMDB.

    python tools/toy/make_davis.py OUT                  writes OUT/DAVIS-toy
    python tools/toy/make_davis.py OUT --jhmdb          writes OUT/JHMDB-toy

JHMDB annotates fifteen joints of one person. The toy set has one animal in each clip, and as its joints the fourteen
keypoints in the order of `diffseg.datasets.toy.KEYPOINTS`, then the middle of the torso, between back and belly; all in
every frame, hidden or not.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from clips import ToyClip, draw_clip
from PIL import Image
from scipy.io import savemat
from tqdm import tqdm

from diffseg.datasets.toy import KEYPOINTS
from diffseg.masks import write_mask

# First clip number of every split: disjoint ranges, so that no clip is in two of them.
SPLITS = {'train': 0, 'val': 1_000_000}
JHMDB_FIRST = 2_000_000
MAT_HEADER = b'MATLAB 5.0 MAT-file, toy quadrupeds'


def main(argv: list[str] | None = None) -> None:
    """Write the data set that the arguments request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, help='folder to write DAVIS-toy or JHMDB-toy into')
    parser.add_argument('--jhmdb', action='store_true', help='keypoints of one animal instead of masks')
    parser.add_argument('--train', type=int, default=4, help='training clips of DAVIS-toy (default: 4)')
    parser.add_argument('--val', type=int, default=8, help='validation clips, or test clips of JHMDB-toy (default: 8)')
    parser.add_argument('--frames', type=int, default=20, help='of each clip (default: 20)')
    parser.add_argument('--size', type=int, nargs=2, default=(96, 160), metavar=('H', 'W'), help='(default: 96 160)')
    parser.add_argument('--seed', type=int, default=0, help='the same seed gives the same bytes (default: 0)')
    args = parser.parse_args(argv)
    try:
        if args.jhmdb:
            write_jhmdb(args.out / 'JHMDB-toy', args)
        else:
            write_davis(args.out / 'DAVIS-toy', args)
    except ValueError as error:
        parser.error(str(error))


def write_davis(root: Path, args: argparse.Namespace) -> None:
    """JPEGImages, Annotations and ImageSets as DAVIS-2017 lays them out."""
    for split, first in SPLITS.items():
        names = []
        for number in tqdm(range(getattr(args, split)), desc=f'{root} {split}'):
            clip = draw_clip(args.seed, first + number, args.frames, *args.size)
            names.append(f'{"-".join(clip.species)}-{split}-{number:03d}')
            frames, masks = (make_folder(root / kind / '480p' / names[-1]) for kind in ('JPEGImages', 'Annotations'))
            for t, (image, mask) in enumerate(zip(clip.images, clip.masks, strict=True)):
                Image.fromarray(image).save(frames / f'{t:05d}.jpg', quality=95, subsampling=0)
                write_mask(masks / f'{t:05d}.png', mask)
        write_list(make_folder(root / 'ImageSets/2017') / f'{split}.txt', names)


def write_jhmdb(root: Path, args: argparse.Namespace) -> None:
    """Rename_Images, joint_positions and the list test.txt; an animal's species is the class."""
    lines = []
    for number in tqdm(range(args.val), desc=str(root)):
        clip = draw_clip(args.seed, JHMDB_FIRST + number, args.frames, *args.size, animals=1)
        video = f'{clip.species[0]}/{clip.species[0]}-{number:03d}'
        frames = make_folder(root / 'Rename_Images' / video)
        for t, image in enumerate(clip.images, start=1):
            Image.fromarray(image).save(frames / f'{t:05d}.png')
        joints = make_folder(root / 'joint_positions' / video) / 'joint_positions.mat'
        joints.write_bytes(joint_file(clip))
        lines.append(f'{frames.relative_to(root)} {joints.relative_to(root)}')
    write_list(root / 'test.txt', lines)


def joint_file(clip: ToyClip) -> bytes:
    """A MATLAB file with `pos_img` (2, 15, T), counted from 1; no time in its header, so that it is reproducible."""
    points = clip.keypoints[0]  # (T, 14, 2)
    torso = points[:, [KEYPOINTS.index(name) for name in ('back', 'belly')]].mean(axis=1, keepdims=True)
    buffer = io.BytesIO()
    savemat(buffer, {'pos_img': np.concatenate([points, torso], axis=1).transpose(2, 1, 0) + 1})
    content = buffer.getvalue()
    return MAT_HEADER.ljust(116) + content[116:]


def write_list(path: Path, lines: list[str]) -> None:
    """A line for each video."""
    make_folder(path.parent)
    path.write_text(''.join(f'{line}\n' for line in lines))


def make_folder(folder: Path) -> Path:
    """Create a folder and those above it; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == '__main__':
    main()

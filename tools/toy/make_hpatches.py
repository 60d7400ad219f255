"""Make a toy HPatches in the official layout: drawn scenes or real pictures with changes of light or viewpoint.

Each scene gives a sequence `i_NAME`, whose light changes increasingly while its homographies are the identity, and a
sequence `v_NAME` with known homographies of increasing strength.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scenes import add_sensor_noise, draw_homography, draw_scene, fit_scene, relight, scene_size, view
from tqdm import tqdm

from diffseg.diffusion.images import SUFFIXES, open_image

STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)  # of the changes from image 1 to images 2, ..., 6


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path, help='folder to write `HPatches-toy` into')
    parser.add_argument('--sequences', type=int, default=8, help='of each kind (default: 8); with --images at most')
    parser.add_argument('--images', type=Path, metavar='FOLDER', help='pictures to use in place of drawn scenes')
    parser.add_argument('--size', type=int, nargs=2, default=(192, 256), metavar=('HEIGHT', 'WIDTH'))
    parser.add_argument('--seed', type=int, default=0, help='the same seed gives the same bytes (default: 0)')
    args = parser.parse_args(argv)
    try:
        if args.sequences < 1 or min(args.size) < 32:
            raise ValueError(f'{args.sequences} sequences of size {args.size}; at least 1, of 32 x 32 pixels')
        paths = None if args.images is None else pictures(args.images)[: args.sequences]
        size = tuple(args.size)
        count = args.sequences if paths is None else len(paths)
        for index in tqdm(range(count), desc=str(args.out / 'HPatches-toy')):
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([args.seed, index])))
            if paths is None:
                name, scene = f'scene{index:02d}', draw_scene(rng, scene_size(size))
            else:
                name, scene = paths[index].stem, fit_scene(open_image(paths[index]), scene_size(size))
            for kind in 'iv':
                write_sequence(args.out / 'HPatches-toy' / f'{kind}_{name}', images(rng, scene, size, kind))
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


def pictures(folder: Path) -> list[Path]:
    """Image files of a folder, by name."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f'{folder} has no image ({", ".join(sorted(SUFFIXES))})')
    return paths


def images(
    rng: np.random.Generator, scene: np.ndarray, size: tuple[int, int], kind: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Image 1 and the identity, and of images 2, ..., 6 the image and its homography from image 1."""
    first = view(scene, np.eye(3), size)
    yield add_sensor_noise(rng, first), np.eye(3)
    for strength in STRENGTHS:
        if kind == 'i':
            yield add_sensor_noise(rng, relight(rng, first, strength)), np.eye(3)
        else:
            homography = draw_homography(rng, size, strength)
            yield add_sensor_noise(rng, view(scene, homography, size)), homography


def write_sequence(folder: Path, images: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write 1.ppm, ..., 6.ppm and H_1_2, ..., H_1_6."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, homography) in enumerate(images, start=1):
        Image.fromarray(image).save(folder / f'{number}.ppm')
        if number > 1:
            np.savetxt(folder / f'H_1_{number}', homography, fmt='%.17g')


if __name__ == '__main__':
    raise SystemExit(main())

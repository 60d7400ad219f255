"""Propagate an edit of one image to images of similar objects, as DIFT does.

    python tools/apply/propagate_edit.py source.jpg sticker.png a.jpg b.jpg --out edits
    python tools/apply/propagate_edit.py source.jpg sticker.png a.jpg b.jpg --out edits --mode homography tps \\
        --model demo/tiny-sd --layers up-level2-repeat0-res-increment --timesteps 50 --ensemble 8 --size 64
    python tools/apply/propagate_edit.py source.jpg sticker.png a.jpg b.jpg --out edits --config CONFIG --checkpoint PTH

The sticker is an RGBA picture of the source's size: the edit, and transparent elsewhere. Random pixels of it are
matched with each target. With `--mode homography` a homography of the matches warps it (RANSAC); with `--mode tps` a
thin-plate spline does, for objects that bend. For each target T and mode M, `T_M.png` is the target with the edit and
`T_M_matches.png` shows the matches, used ones in green and others in red.

Without other options the model is as in DIFT: `--model sd21 --layers dift --timesteps 261 --size 768 --prompt 'a photo
of a cat'`. With `--config` a trained model is used, and images are prepared with its test pipeline. A target whose
matches support no edit is reported and skipped; the exit code is then 1.
"""

import argparse
import pickle
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from diffseg.apis import prepare_pair
from diffseg.command_line import add_model_arguments, check_model_arguments, matcher_of
from diffseg.diffusion.images import open_image
from diffseg.edits import (
    composite,
    fit_homography,
    fit_spline,
    read_sticker,
    sample_points,
    warp_homography,
    warp_spline,
)
from diffseg.models import CorrespondenceModel
from diffseg.structures import PairSample
from diffseg.visualization import grid, match_lines, outline

MODES = 'homography', 'tps'
DIFT = {'layers': ['dift'], 'timesteps': [261], 'size': [768], 'prompt': 'a photo of a cat'}
THRESHOLD = 5 / 16  # of a cell: 5 pixels with the cells of DIFT, which are 16 pixels wide
OUTLINE = (255, 220, 0)
LINES = 60


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path)
    parser.add_argument('sticker', type=Path, help="RGBA, of the source's size")
    parser.add_argument('targets', type=Path, nargs='+', metavar='target')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR')
    parser.add_argument('--overview', type=Path, metavar='PNG', help='one picture of the source and all targets')
    parser.add_argument('--mode', nargs='+', choices=MODES, default=['homography'])
    parser.add_argument('--samples', type=int, default=1000, help='pixels that are matched at most (default: 1000)')
    parser.add_argument('--seed', type=int, default=0, help='of these pixels')
    parser.add_argument(
        '--threshold', type=float, help='error of an inlier in pixels, at most (default: 5/16 of a cell, as in DIFT)'
    )
    add_model_arguments(parser)
    parser.set_defaults(**DIFT)
    args = parser.parse_args(argv)
    if args.config is None and args.model is None:
        args.model = 'sd21'
    check_model_arguments(parser, args)
    if args.samples < 1:
        parser.error('--samples takes a number above 0')
    if args.threshold is not None and args.threshold <= 0:
        parser.error('--threshold takes a number above 0')
    if twice := [name for name, count in Counter(path.stem for path in args.targets).items() if count > 1]:
        parser.error(f'several targets are named {", ".join(twice)}, and their output files would collide')
    return args


@dataclass(frozen=True)
class Matches:
    """Matches of pixels of the sticker in a target.

    Attributes:
        points: (x, y) in the source, with shape (N, 2).
        matches: in the target, with shape (N, 2).
        returned: the matches of `matches` back in the source, with shape (N, 2).
        cells: the larger side of a map's cell in pixels, of the source and of the target.
    """

    points: np.ndarray
    matches: np.ndarray
    returned: np.ndarray
    cells: tuple[float, float]


def match(
    model: CorrespondenceModel,
    pipeline: Sequence[Mapping[str, Any]],
    paths: tuple[Path, Path],
    points: np.ndarray,
    category: str | None,
) -> Matches:
    """Match points of the first image with the second, and back."""
    data = model.data_preprocessor(prepare_pair(paths, points.astype(np.float32), pipeline, category))
    (there,) = data['data_samples']
    ((source, target),) = model.encode_pairs(data['inputs'], data['data_samples'])
    matches = model.match(source, target, there)
    back = PairSample(metainfo={'ori_shape0': there.ori_shape1, 'ori_shape1': there.ori_shape0})
    back.keypoints0, back.visible = matches, there.visible
    returned = model.match(target, source, back)
    sides = zip((there.ori_shape0, there.ori_shape1), (source, target), strict=True)
    cells = tuple(max(s / n for s, n in zip(size, maps.shape[1:], strict=True)) for size, maps in sides)
    return Matches(points, matches.numpy(), returned.numpy(), cells)


def warp(
    sticker: np.ndarray, matches: Matches, size: tuple[int, int], mode: str, threshold: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """The sticker warped to a target of (height, width), and a mask (N,) of the matches that were used."""
    threshold = THRESHOLD * matches.cells[1] if threshold is None else threshold
    if mode == 'homography':
        homography, used = fit_homography(matches.points, matches.matches, sticker, size, threshold)
        return warp_homography(sticker, homography, size), used
    triples = matches.points, matches.matches, matches.returned
    backward, used = fit_spline(*triples, sticker.shape[:2], size, threshold, tolerance=matches.cells[0])
    return warp_spline(sticker, backward), used


def outlined(picture: Tensor, sticker: np.ndarray) -> Tensor:
    """A picture (3, H, W) with the outline of a sticker (H, W, 4)."""
    drawn = (sticker[..., 3] > 0).astype(np.uint8)
    for contour in cv2.findContours(drawn, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]:
        picture = outline(picture, torch.from_numpy(contour[:, 0]), OUTLINE)
    return picture


def to_picture(image: np.ndarray) -> Tensor:
    """Picture (3, H, W) of an image (H, W, 3), uint8."""
    return torch.from_numpy(image).permute(2, 0, 1) / 255


def draw_matches(source: Tensor, target: Tensor, matches: Matches, used: np.ndarray) -> Image.Image:
    """Some of the matches, used ones in green on top of the others in red."""
    shown = np.unique(np.linspace(0, len(used) - 1, min(LINES, len(used))).round().astype(int))
    shown = shown[np.argsort(used[shown], kind='stable')]
    points = torch.from_numpy(matches.points[shown]).double(), torch.from_numpy(matches.matches[shown])
    return match_lines((source, target), points, torch.from_numpy(used[shown]))


@torch.inference_mode()
def run(args: argparse.Namespace) -> list[str]:
    """Write all edits; returns a message for each target and mode that failed."""
    image = np.array(open_image(args.source))
    sticker = read_sticker(args.sticker, image.shape[:2])
    points = sample_points(sticker, args.samples, args.seed)
    model, pipeline = matcher_of(args)
    model.to(args.device).eval()
    edited = composite(image, warp_homography(sticker, np.eye(3), image.shape[:2]))
    source = outlined(to_picture(edited), sticker)
    args.out.mkdir(parents=True, exist_ok=True)
    names, failures = ['the edit'], []
    sheet = {mode: [to_picture(edited)] for mode in args.mode}
    for path in tqdm(args.targets, disable=None):
        try:
            target = np.array(open_image(path))
            matches = match(model, pipeline, (args.source, path), points, args.category)
        except (ValueError, FloatingPointError) as error:
            failures.append(f'{path}: {str(error).removeprefix(f"{path}: ")}')
            continue
        names.append(path.stem)
        for mode in args.mode:
            try:
                warped, used = warp(sticker, matches, target.shape[:2], mode, args.threshold)
            except ValueError as error:
                failures.append(f'{path}, {mode}: {error}')
                sheet[mode].append(to_picture(target) / 4 + 0.75)  # faded
                continue
            edited = composite(target, warped)
            Image.fromarray(edited).save(args.out / f'{path.stem}_{mode}.png')
            draw_matches(source, to_picture(target), matches, used).save(args.out / f'{path.stem}_{mode}_matches.png')
            sheet[mode].append(to_picture(edited))
            tqdm.write(f'{path}, {mode}: {used.sum()} of {len(used)} matches used')
    if args.overview is not None:
        args.overview.parent.mkdir(parents=True, exist_ok=True)
        drawing = grid(list(sheet.values()), args.mode if len(args.mode) > 1 else (), names, smooth=True)
        drawing.quantize(128).save(args.overview, 'PNG', optimize=True)
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        failures = run(args)
    except (OSError, ValueError, FloatingPointError, SafetensorError, pickle.UnpicklingError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    for failure in failures:
        print(f'error: {failure}', file=sys.stderr)
    return 1 if failures else 0


if __name__ == '__main__':
    raise SystemExit(main())

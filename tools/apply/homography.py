"""Estimate the homography between two images from matched keypoints, and draw both.

    python tools/apply/homography.py CONFIG a.png b.png --out homography.png
    python tools/apply/homography.py CONFIG v_wall/1.ppm v_wall/3.ppm --truth v_wall/H_1_3 --out homography.png

The config is one of `configs/hpatches`: it defines how images are prepared, keypoints detected and descriptors matched.
The picture has matches that support the homography in green, others in red, and the outline of the source: in the
target yellow under the estimated homography, and white under that of `--truth`.
"""

import argparse
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

import diffseg  # noqa: F401  registers its parts and lets checkpoints be read
from diffseg.datasets.hpatches import read_homography
from diffseg.devices import default_device
from diffseg.diffusion.images import read_image
from diffseg.evaluation.homography import METHODS, corner_error, estimate_homography, image_corners, transform
from diffseg.inspection import load_weights
from diffseg.keypoints import read_keypoints
from diffseg.structures import HomographySample
from diffseg.visualization import match_lines, outline, to_picture

ESTIMATED, TRUE = (255, 220, 0), (255, 255, 255)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='of a SparseMatcher')
    parser.add_argument('source', type=Path)
    parser.add_argument('target', type=Path)
    parser.add_argument('--out', type=Path, required=True, metavar='PNG')
    parser.add_argument('--checkpoint', help='of the model (default: none, as for zero-shot configs)')
    parser.add_argument('--keypoints', nargs=2, metavar='FILE', help="of both images (default: the config's detector)")
    parser.add_argument('--truth', metavar='FILE', help='the true homography, three lines of three numbers')
    parser.add_argument('--method', choices=METHODS, help="of the estimate (default: the config's)")
    parser.add_argument('--lines', type=int, default=40, help='how many matches to draw at most (default: 40)')
    parser.add_argument('--device', default=default_device())
    return parser.parse_args(argv)


def match(cfg: Config, args: argparse.Namespace) -> HomographySample:
    """The pair with its matches."""
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model)
    if args.checkpoint is not None:
        load_weights(model, args.checkpoint, args.config)
    results: dict[str, Any] = {'pair_id': '0', 'sequence': '', 'img_path0': str(args.source)}
    results['img_path1'] = str(args.target)
    if args.keypoints is not None:
        results |= {f'keypoints{view}': read_keypoints(path) for view, path in enumerate(args.keypoints)}
        results['keypoint_source'] = ', '.join(args.keypoints)
    batch = pseudo_collate([Compose(cfg.test_dataloader.dataset.pipeline)(results)])
    (sample,) = model.to(args.device).eval().test_step(batch)
    return sample


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    cfg = Config.fromfile(args.config)
    if cfg.get('model', {}).get('type') != 'SparseMatcher':
        raise ValueError(f'{args.config}: its model is no SparseMatcher; use a config like those of configs/hpatches')
    truth = None if args.truth is None else read_homography(args.truth)
    sample = match(cfg, args)
    rows = sample.pred_matches.numpy()
    points = [sample.get(f'keypoints{view}').numpy()[rows[:, view]] for view in (0, 1)]
    estimate = {key: cfg.test_evaluator[key] for key in ('method', 'threshold') if key in cfg.test_evaluator}
    homography, inliers = estimate_homography(*points, **(estimate | ({'method': args.method} if args.method else {})))
    counts = ' and '.join(str(len(sample.get(f'keypoints{view}'))) for view in (0, 1))
    print(f'{len(rows)} matches of {counts} points, {inliers.sum()} inliers')
    if homography is None or inliers.sum() < 4:
        raise ValueError(
            f'{len(rows)} matches support no homography, which needs 4 inliers; use more points, or images that '
            f'overlap more'
        )
    print('\n'.join(' '.join(f'{value:.8g}' for value in row) for row in homography))
    if truth is not None:
        print(f'corner error {corner_error(homography, truth, sample.ori_shape0):.2f} px')

    source, target = (to_picture(read_image(path)) for path in (args.source, args.target))
    corners = image_corners(sample.ori_shape0)
    source = outline(source, torch.from_numpy(corners), ESTIMATED)
    for matrix, colour, width in ((truth, TRUE, 5), (homography, ESTIMATED, 2)):
        if matrix is not None:
            target = outline(target, torch.from_numpy(transform(matrix, corners)), colour, width)
    shown = np.unique(np.linspace(0, len(rows) - 1, min(args.lines, len(rows))).round().astype(int))
    shown = shown[np.argsort(inliers[shown], kind='stable')]  # outliers below
    args.out.parent.mkdir(parents=True, exist_ok=True)
    drawn = tuple(torch.from_numpy(keypoints[shown]) for keypoints in points)
    drawing = match_lines((source, target), drawn, torch.from_numpy(inliers[shown]))
    drawing.quantize(128).save(args.out, 'PNG', optimize=True)  # a quarter of the bytes


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError, FloatingPointError, pickle.UnpicklingError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    raise SystemExit(main())

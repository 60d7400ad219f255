"""Show how an AggregationNeck mixes layers and timesteps: a table for each of its levels, and a picture.

    python tools/analysis/mixing_weights.py work_dirs/CONFIG/iter_8000.pth --out mixing.png

Without CONFIG, the neck is built from the config that mmengine writes into its checkpoints; it is parsed as data, not
executed. No model but the neck is built.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

import diffseg  # noqa: F401  registers its parts and lets checkpoints be read
from diffseg.inspection import read_mixing_weights, read_training_checkpoint, stored_model
from diffseg.visualization import mixing_figure, render


def stack_vertically(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Stack pictures (H, W, 3), padded with white to one width."""
    width = max(picture.shape[1] for picture in pictures)
    wide = [np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in pictures]
    return np.concatenate(wide)


def run(args: argparse.Namespace) -> None:
    init_default_scope('mmseg')
    checkpoint = read_training_checkpoint(args.checkpoint)
    model = stored_model(checkpoint) if args.config is None else Config.fromfile(args.config).model
    pictures = []
    for title, table in read_mixing_weights(checkpoint, model):
        print(f'{title}\n{table}\n')
        pictures.append(render(mixing_figure(table.weights, table.timesteps, table.layers, f'{title}: weights, %')))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(stack_vertically(pictures)).save(args.out, 'PNG')
        print(args.out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint')
    parser.add_argument('config', nargs='?', help='(default: that of the checkpoint)')
    parser.add_argument('--out', type=Path, metavar='PNG', help='the picture to write')
    args = parser.parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    raise SystemExit(main())

"""Trained parameters of configs, and what neck and head compute for an image: a line of a table for each.

    python tools/analysis/neck_costs.py configs/correspondence/toy-necks/[!_]*.py --size 64

Operations are those of one image (2 for a multiply-add) of matrix products and convolutions, counted on the meta device
as `benchmark.py --count-only` does; those of the frozen backbone are not among them. No weights are read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from describe_configs import build
from mmengine.config import Config

from diffseg.benchmarking import executed, table_head
from diffseg.command_line import parse_size


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', type=Path, metavar='CONFIG')
    parser.add_argument('--size', type=parse_size, required=True, metavar='H[xW]', help='of the image')
    args = parser.parse_args(argv)
    print(table_head(('config', 'trained parameters', 'MFLOP an image')))
    for path in args.configs:
        try:
            parameters, operations = costs(path, args.size)
        except (OSError, ValueError) as error:
            print(f'error: {path}: {error}', file=sys.stderr)
            return 2
        print(f'| `{path.stem}` | {parameters:,} | {operations / 1e6:.1f} |')
    return 0


@torch.no_grad()
def costs(path: Path, size: tuple[int, int]) -> tuple[int, int]:
    """Trained parameters of the model of a config, and operations behind its backbone for an image (height, width)."""
    cfg = Config.fromfile(path, import_custom_modules=False)
    cfg.model.backbone.cache = None
    model = build(cfg)
    maps = model.backbone(torch.empty(1, 3, *size, device='meta'))
    if hasattr(model, 'decode_head'):
        operations = executed(lambda: model.decode_head(model.neck(maps) if model.with_neck else maps))
    else:
        operations = executed(lambda: model.describe(maps))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad), operations


if __name__ == '__main__':
    raise SystemExit(main())

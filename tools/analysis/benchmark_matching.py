"""Measure time and memory of keypoint matching against the published procedure.

    python tools/analysis/benchmark_matching.py 24 48

Keypoints are matched between random maps of CELLS x CELLS cells, at the size of the image, by two procedures in turn:

* **ours**: `match_points`;
* **published**: what DIFT's evaluation does: upsample both maps to the size of their image, and for every keypoint
  normalise the whole target map and multiply it with the keypoint's descriptor.

Each case runs in a separate process. The ratio is the median over pairs of measurements; memory is what a procedure
needs in addition to the maps. The last columns are the number of equal matches, and the largest difference of the
cosine similarities that the two procedures reach, computed in double precision. Beyond the centres of border cells all
pixels have the same descriptor, so the same similarity: there `match_points` takes the first one, and the published
procedure the one that rounding errors in single precision choose.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffseg.benchmarking import in_subprocess, in_turn, machine, print_table, table_head
from diffseg.devices import default_device
from diffseg.models.correspondence import UpsampledSimilarity, descriptors_at, match_points


@dataclass(frozen=True)
class Case:
    """One line of the table: maps (channels, cells, cells) and images of height x width pixels."""

    cells: int
    channels: int
    height: int
    width: int
    keypoints: int
    device: str = 'cpu'
    repeat: int = 3


def published_matches(source: Tensor, target: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
    """Match as DIFT's evaluation on SPair-71k does.

    Args:
        source: descriptors with shape (C, h, w).
        target: the same.
        points: (x, y) with shape (N, 2).
        size: height and width of both images.

    Returns:
        (x, y) with shape (N, 2).
    """
    source, target = (F.interpolate(maps[None], size, mode='bilinear') for maps in (source, target))
    matches = []
    for x, y in points.tolist():
        query = F.normalize(source[0, :, y, x][None])  # (1, C)
        candidates = F.normalize(target[0].flatten(1).T)  # (H*W, C)
        best = int((candidates @ query.T).cpu().argmax())
        matches.append([best % size[1], best // size[1]])
    return torch.tensor(matches)


def measure(case: Case) -> dict[str, Any]:
    """Run both procedures in turn.

    Returns:
        For each procedure its `ms` (median), its peak `memory` in bytes beyond that before the call (None where it
        cannot be read), the `ratio` of their times, how many of the matches are the `same`, and the largest
        `difference` of the similarities that both reach.
    """
    source, target = torch.randn(2, case.channels, case.cells, case.cells, device=case.device)
    size = case.height, case.width
    points = torch.stack([torch.randint(side, (case.keypoints,)) for side in (case.width, case.height)], dim=1)
    procedures = {
        'ours': lambda: match_points(source, target, points, size, size).cpu(),
        'published': lambda: published_matches(source, target, points, size),
    }
    small = source[:2], target[:2], points[:1] * 0
    match_points(*small, (8, 8), (8, 8)), published_matches(*small, (8, 8))  # warm-up: kernels load at the first call
    result, matches = in_turn(procedures, case.device, case.repeat)
    result['same'] = int((matches['ours'] == matches['published']).all(1).sum())
    similarity = UpsampledSimilarity.of(descriptors_at(source, points, size), target, size)
    queries = torch.arange(len(points), device=source.device)
    ours, theirs = (similarity.at(queries, *match.to(source.device).T.flip(0)) for match in matches.values())
    result['difference'] = float((ours - theirs).abs().max())
    return result


TITLES = (
    *('cells', 'channels', 'image', 'keypoints', 'ms', 'published ms', 'ratio', 'MB', 'published MB'),
    *('same', 'difference'),
)


def line(case: Case, measured: Mapping[str, Any]) -> str:
    """A case's line of the Markdown table."""
    procedures = measured['ours'], measured['published']
    cells = [case.cells, case.channels, f'{case.height} x {case.width}', case.keypoints]
    cells += [f'{procedure["ms"]:.0f}' for procedure in procedures] + [f'{measured["ratio"]:.0f}']
    cells += ['-' if (memory := procedure['memory']) is None else f'{memory / 1e6:.0f}' for procedure in procedures]
    cells += [measured['same'], f'{measured["difference"]:.0e}']
    return f'| {" | ".join(map(str, cells))} |'


def rows(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each case's results and its line of the table."""
    for cells in args.cells:
        case = Case(cells, args.channels, *args.image_size, args.keypoints, args.device, args.repeat)
        measured = in_subprocess(__file__, case)
        yield {'case': asdict(case), 'measured': measured}, line(case, measured)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--case', help=argparse.SUPPRESS)
    parser.add_argument('cells', nargs='*', type=int, default=[24, 48], help='sides of the maps (default: 24 48)')
    parser.add_argument('--channels', type=int, default=1280, help='of the maps')
    parser.add_argument('--keypoints', type=int, default=10, help='that are matched')
    parser.add_argument('--image-size', nargs=2, type=int, default=(375, 500), metavar=('HEIGHT', 'WIDTH'))
    parser.add_argument('--repeat', type=int, default=3, help='pairs of measurements')
    parser.add_argument('--device', default=default_device())
    parser.add_argument('--json', type=Path, help='write the results there as well')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.case:
        print(json.dumps(measure(Case(**json.loads(args.case)))))
        return 0
    return print_table(f'matching; {machine(args.device)}', table_head(TITLES), rows(args), args.json)


if __name__ == '__main__':
    raise SystemExit(main())

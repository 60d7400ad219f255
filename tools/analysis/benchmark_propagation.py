"""Measure time and memory of label propagation against the published procedure.

    python tools/analysis/benchmark_propagation.py --repeat 1

The labels of FRAMES frames and the first one, of HEIGHT x WIDTH cells, are propagated to one more, by two procedures in
turn; by default 28 frames of 60 x 107 cells, which are DAVIS's 480 x 854 pixels, with DIFT's settings for it:

* **ours**: `propagate_labels`;
* **published**: what DIFT's evaluation does: multiply all cells of all frames with those of the target, zero the
  weights outside of the windows, and take the top-k of each column. Here in place and with one mask for all frames, so
  that it needs less memory than the released code.

The ratio is the median over pairs of measurements; memory is what a procedure needs in addition to the maps. The last
columns are the largest difference of soft labels, the number of undecided cells, which are left out of it, and the
share of cells with the same highest label. A cell is undecided where the last similarity of its top k and the next one,
computed in double precision, differ by less than 1e-6: rounding errors in single precision decide which of the two
counts, and its soft labels differ by some hundredths.
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
from diffseg.models.propagation import propagate_labels

ROUNDING = 1e-6  # of similarities, and of soft labels, in single precision


@dataclass(frozen=True)
class Case:
    """One line of the table: height x width cells, `frames` besides the first one."""

    height: int
    width: int
    frames: int
    channels: int
    device: str = 'cpu'
    repeat: int = 3
    labels: int = 4
    topk: int = 15
    radius: int = 15
    temperature: float = 0.2


def masked_matrix(
    target: Tensor, context: Tensor, labels: Tensor, topk: int, radius: int, temperature: float
) -> Tensor:
    """Propagate labels as DIFT's evaluation on DAVIS does.

    Args:
        target: descriptors with shape (C, h, w).
        context: the same of n frames, shape (n, C, h, w).
        labels: soft labels of these frames, with shape (n, K, h, w).
        topk: how many cells to average.
        radius: of the window, in cells.
        temperature: of the weights.

    Returns:
        Shape (K, h, w).
    """
    cells = target.shape[1:]
    queries, keys = F.normalize(target.flatten(1), dim=0), F.normalize(context.flatten(2), dim=1)
    weights = torch.bmm(keys.transpose(1, 2), queries.expand(len(keys), -1, -1))  # (n, h*w, h*w)
    weights.div_(temperature).exp_()
    row, column = (
        (position[:, None] - position).abs() <= radius  # (h*w, h*w)
        for position in torch.cartesian_prod(*(torch.arange(side, device=target.device) for side in cells)).T
    )
    weights *= row & column
    weights = weights.flatten(0, 1)  # (n*h*w, h*w)
    weights[weights < weights.topk(topk, dim=0).values[-1]] = 0
    weights /= weights.sum(0)
    return (labels.transpose(0, 1).flatten(1) @ weights).unflatten(1, cells)


def margin(target: Tensor, context: Tensor, y: int, x: int, topk: int, radius: int) -> float:
    """By how much the last of a cell's top k cosines exceeds the next one, in double precision.

    Args:
        target: descriptors with shape (C, h, w).
        context: the same of n frames, shape (n, C, h, w).
        y: row of the cell.
        x: column of the cell.
        topk: how many cells count.
        radius: of the window, in cells.
    """
    rows, columns = (slice(max(i - radius, 0), i + radius + 1) for i in (y, x))
    keys = F.normalize(context[..., rows, columns].double(), dim=1)
    cosines = torch.einsum('c,nchw->nhw', F.normalize(target[:, y, x].double(), dim=0), keys).flatten()
    *_, last, following = cosines.topk(topk + 1).values.tolist()
    return last - following


def measure(case: Case) -> dict[str, Any]:
    """Run both procedures in turn.

    Returns:
        The results of `in_turn`, with the largest `difference` of soft labels where cells are decided, the number of
        `undecided` cells, and the fraction `same` of cells whose
        highest label is equal.
    """
    cells = case.height, case.width
    target = torch.randn(case.channels, *cells, device=case.device)
    context = target + torch.randn(case.frames + 1, *target.shape, device=case.device)
    labels = torch.randn(case.frames + 1, case.labels, *cells, device=case.device).softmax(1)
    settings = case.topk, case.radius, case.temperature
    stored = list(context.to(memory_format=torch.channels_last))  # as the model stores them
    procedures = {
        'ours': lambda: propagate_labels(target, stored, labels, *settings).cpu(),
        'published': lambda: masked_matrix(target, context, labels, *settings).cpu(),
    }
    few = context[:2, :2, :4, :4]
    propagate_labels(few[0], few, few, 2, 1, 1.0), masked_matrix(few[0], few, few, 2, 1, 1.0)  # warm-up
    result, propagated = in_turn(procedures, case.device, case.repeat)
    differences = (propagated['ours'] - propagated['published']).abs().amax(0)  # (h, w)
    undecided = torch.zeros(cells, dtype=torch.bool)
    for y, x in (differences > ROUNDING).nonzero().tolist():  # elsewhere both agree
        undecided[y, x] = margin(target, context, y, x, case.topk, case.radius) < ROUNDING
    result['undecided'] = int(undecided.sum())
    result['difference'] = float(differences.where(~undecided, 0).max())
    result['same'] = float((propagated['ours'].argmax(0) == propagated['published'].argmax(0)).float().mean())
    return result


TITLES = (
    *('cells', 'frames', 'channels', 'ms', 'published ms', 'ratio', 'MB', 'published MB'),
    *('difference', 'undecided', 'same labels'),
)


def line(case: Case, measured: Mapping[str, Any]) -> str:
    """A case's line of the Markdown table."""
    procedures = measured['ours'], measured['published']
    cells = [f'{case.height} x {case.width}', f'{case.frames} + 1', case.channels]
    cells += [f'{procedure["ms"]:.0f}' for procedure in procedures] + [f'{measured["ratio"]:.1f}']
    cells += ['-' if (memory := procedure['memory']) is None else f'{memory / 1e6:.0f}' for procedure in procedures]
    cells += [f'{measured["difference"]:.0e}', measured['undecided'], f'{measured["same"]:.2%}']
    return f'| {" | ".join(map(str, cells))} |'


def rows(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the case's results and its line of the table."""
    case = Case(*args.cells, args.frames, args.channels, args.device, args.repeat)
    measured = in_subprocess(__file__, case)
    yield {'case': asdict(case), 'measured': measured}, line(case, measured)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--case', help=argparse.SUPPRESS)
    parser.add_argument('--cells', nargs=2, type=int, default=(60, 107), metavar=('HEIGHT', 'WIDTH'))
    parser.add_argument('--frames', type=int, default=28, help='besides the first one')
    parser.add_argument('--channels', type=int, default=640, help='of the maps')
    parser.add_argument('--repeat', type=int, default=3, help='pairs of measurements')
    parser.add_argument('--device', default=default_device())
    parser.add_argument('--json', type=Path, help='write the results there as well')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.case:
        print(json.dumps(measure(Case(**json.loads(args.case)))))
        return 0
    return print_table(f'label propagation; {machine(args.device)}', table_head(TITLES), rows(args), args.json)


if __name__ == '__main__':
    raise SystemExit(main())

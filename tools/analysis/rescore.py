"""Recompute PCK from the result file of an evaluation, without the model.

    python tools/analysis/rescore.py work_dirs/dift/pck.json
    python tools/analysis/rescore.py work_dirs/dift/pck.json --thresholds 0.02 0.2 --bases img

The exit status is 1 if figures in the file are not those of its predictions.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from diffseg.evaluation.pck import BASES, THRESHOLDS, aligned_figures, format_coverage_table, format_table, score


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('result', type=Path, help='out_file of PCKMetric')
    parser.add_argument('--thresholds', nargs='+', type=float, default=THRESHOLDS, help='fractions of the base')
    parser.add_argument('--bases', nargs='+', choices=BASES, default=BASES)
    args = parser.parse_args(argv)

    try:
        result = json.loads(args.result.read_text())
    except (OSError, ValueError) as error:
        print(f'error: {args.result} cannot be read: {error}', file=sys.stderr)
        return 2
    if missing := {'protocol', 'predictions', 'figures'} - set(result):
        print(f'error: {args.result} is not an out_file of PCKMetric: it has no {sorted(missing)}', file=sys.stderr)
        return 2
    print(json.dumps(result['protocol'], indent=1))
    coverages = result['protocol'].get('coverages')
    figures = score(result['predictions'], args.thresholds, args.bases, coverages)
    print(format_table(figures, args.thresholds, args.bases))
    if (aligned := aligned_figures(figures)) is not None:
        print(f'with pose alignment:\n{format_table(aligned, args.thresholds, args.bases)}')
    if coverages is not None:
        print(format_coverage_table(figures, coverages, args.thresholds, args.bases))
    different = [
        f'{group} {name} is {value:.4f}, the file says {result["figures"][group][name]:.4f}'
        for group, scores in figures.items()
        for name, value in scores.items()
        if abs(value - result['figures'][group].get(name, value)) > 1e-9
    ]
    print('\n'.join(different) or 'The figures in the file are those of its predictions.')
    return 1 if different else 0


if __name__ == '__main__':
    raise SystemExit(main())

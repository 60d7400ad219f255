"""Search for the activations and timesteps that serve a task best, on the training data of a config.

    python tools/search.py configs/search/practical_t50_zero-shot.py --out work_dirs/search/pairs
    python tools/search.py CONFIG --layers 'up-*' --timesteps 50 261 --samples 100 --shard 0/4 --out OUT

Every activation at every timestep is a candidate. Candidates are ranked by zero-shot PCK for a config of semantic
correspondence, and by the mIoU of a linear probe for one of segmentation. A greedy selection among the best then adds
the candidate that raises the score of the set most. OUT then holds

    ranking.csv, ranking.json   all candidates, best first
    heatmap.png                 activations x timesteps
    selected.json               the selection step by step, and the score of the config's present layers
    selected.py                 the config with this selection, ready to train and test

and the results of single samples, from which an interrupted search resumes. With --shard i/n it processes the i-th of n
parts of the samples; when all are done, the same command without --shard finishes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.device import get_device

import diffseg  # noqa: F401  registers its parts
from diffseg.command_line import parse_size, parse_timestep
from diffseg.inspection import available_sites
from diffseg.search.report import write_results
from diffseg.search.task import COUNTS, TIMESTEPS, Options, Search


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (FloatingPointError, OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    model = cfg.model.backbone.get('model', '')
    available, _ = available_sites(model, cfg.model.backbone.get('revision'))
    options = Options(**{name: getattr(args, name) for name in Options._fields})
    search = Search(cfg, available, options)
    if args.estimate and args.size:
        print(search.plan(None, args.size).text)
        return
    samples = search.load_data()
    plan = search.plan(samples)
    print(plan.text)
    if args.estimate:
        return
    result = search.run(samples, args.out, plan.micro_batch, args.shard)
    if isinstance(result, int):  # samples without results yet
        print(f'{result} samples are left to other shards; when those are done, finish without --shard')
        return
    write_results(args.out, cfg, result)
    print(f'{"rank":>4}  {result.name:>20}  candidate')
    for number, (candidate, score) in enumerate(result.ranking[: args.best], 1):
        print(f'{number:4}  {score:20.2f}  {candidate}')
    for chosen, score in result.steps:
        print(f'{score:26.2f}  {" + ".join(map(str, chosen)) if len(chosen) == 1 else f"+ {chosen[-1]}"}')
    if result.configured is not None:
        print(f"{result.configured[1]:26.2f}  the config's {len(result.configured[0])} activations")
    print(args.out / 'selected.py')


def parse_shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition('/')
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f'{text!r} is not i/n with 0 <= i < n')
    return int(index), int(count)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--layers', nargs='+', default=['*'], help='names, patterns and sets (default: all)')
    parser.add_argument(
        '--timesteps',
        type=parse_timestep,
        nargs='+',
        default=TIMESTEPS,
        help='indices, or sigmas of rectified flow (default: 50, 150, ..., 950, which are sigmas of 0.05, ..., 0.95)',
    )
    counts = ' or '.join(f'{count} {kind}' for kind, count in COUNTS.items())
    parser.add_argument(
        '--samples', '--pairs', '--images', dest='count', type=int, metavar='N', help=f'(default: all, up to {counts})'
    )
    parser.add_argument('--seeds', type=int, default=1, help='draws of noise, each for all samples (default: 1)')
    parser.add_argument('--k', type=int, default=4, help='candidates to select (default: 4)')
    parser.add_argument('--shortlist', type=int, default=60, help='best candidates to select from (default: 60)')
    parser.add_argument('--shard', type=parse_shard, default=(0, 1), metavar='I/N', help='do one of N parts')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/search'), help='(default: %(default)s)')
    parser.add_argument('--estimate', action='store_true', help='only print calls, memory and disk space, as estimated')
    parser.add_argument('--size', type=parse_size, metavar='H[xW]', help='estimate for such images, without data')
    parser.add_argument('--best', type=int, default=10, help='candidates of the ranking to print (default: 10)')
    parser.add_argument('--dim', type=int, help='project maps with more channels (default: as the score needs)')
    parser.add_argument('--dtype', choices=['float16', 'float32'], default='float16', help='of maps that are kept')
    parser.add_argument('--store-gb', type=float, default=8, help='maps to keep between pairs (default: 8)')
    parser.add_argument('--micro-batch', type=int, help='timesteps in one call of the network (default: by their size)')
    parser.add_argument('--device', default=get_device())
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE')
    return parser.parse_args(argv)


if __name__ == '__main__':
    raise SystemExit(main())

"""Test a checkpoint with the metrics of an mmengine config; results go to ./work_dirs/CONFIG unless told otherwise.

A model without anything to train, such as one for zero-shot matching, needs no checkpoint.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

import diffseg  # noqa: F401  registers its parts


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config')
    parser.add_argument('checkpoint', nargs='?')
    parser.add_argument('--work-dir', help='folder for logs and metrics')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local-rank', '--local_rank', help=argparse.SUPPRESS)  # passed by torch.distributed.launch
    args = parser.parse_args(argv)

    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    cfg.merge_from_dict(args.cfg_options)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(args.config).stem))
    cfg.load_from = args.checkpoint or cfg.get('load_from')
    runner = Runner.from_cfg(cfg)
    trained = next((name for name, parameter in runner.model.named_parameters() if parameter.requires_grad), None)
    if trained and not cfg.load_from:
        parser.error(f'the model has parameters to train ({trained}, ...); give a checkpoint')
    return runner.test()


if __name__ == '__main__':
    main()

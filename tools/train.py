"""Train the model of an mmengine config; logs and checkpoints go to ./work_dirs/CONFIG by default.

The arguments are those of mmseg's tools/train.py.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.runner import Runner
from mmseg.registry import RUNNERS

import diffseg  # noqa: F401  registers its parts

DDP = 'MMDistributedDataParallel'


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    train(Config.fromfile(args.config), args, parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `train` reads."""
    parser.add_argument('config')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints')
    parser.add_argument('--resume', action='store_true', help='resume from the last checkpoint in the work dir, if any')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision; needs an accelerator')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local-rank', '--local_rank', help=argparse.SUPPRESS)  # passed by torch.distributed.launch


def train(cfg: Config, args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Train what a config describes, changed by the arguments."""
    if args.local_rank is not None:
        os.environ.setdefault('LOCAL_RANK', args.local_rank)
    cfg.launcher = args.launcher
    cfg.merge_from_dict(args.cfg_options)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(args.config).stem))
    if args.resume:
        # mmengine would resume from `load_from` of the config: the initial weights, not the work dir's checkpoint
        cfg.resume = Path(cfg.work_dir, 'last_checkpoint').is_file()
        cfg.load_from = None if cfg.resume else cfg.get('load_from')
    if args.amp:
        if cfg.optim_wrapper.type not in ('OptimWrapper', 'AmpOptimWrapper'):
            parser.error(f'--amp replaces OptimWrapper, but optim_wrapper is {cfg.optim_wrapper.type}')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    wrapper = cfg.get('model_wrapper_cfg')
    if wrapper and wrapper.get('type', DDP) == DDP:  # mmengine's default, which PyTorch's would replace otherwise:
        wrapper.setdefault('broadcast_buffers', False)  # the frozen network would be sent around in every iteration
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.train()


if __name__ == '__main__':
    main()

"""Test a checkpoint with the metrics of an mmengine config; results go to ./work_dirs/CONFIG by default.

A model without trainable parameters, such as one for zero-shot matching, needs no checkpoint. The arguments are those
of mmseg's tools/test.py.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.runner import Runner
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS

import diffseg  # noqa: F401  registers its parts
from diffseg.inspection import dataset_configs


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config')
    parser.add_argument('checkpoint', nargs='?')
    parser.add_argument('--work-dir', help='folder for logs and metrics')
    parser.add_argument('--out', help='folder for the predicted label maps, as PNG files')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='folder for pictures of the predictions')
    parser.add_argument('--wait-time', type=float, default=2, metavar='SECONDS', help='between pictures of --show')
    parser.add_argument('--tta', action='store_true', help="test-time augmentation: the config's tta_pipeline")
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local-rank', '--local_rank', help=argparse.SUPPRESS)  # passed by torch.distributed.launch
    args = parser.parse_args(argv)
    if args.local_rank is not None:
        os.environ.setdefault('LOCAL_RANK', args.local_rank)

    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    cfg.merge_from_dict(args.cfg_options)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(args.config).stem))
    cfg.load_from = args.checkpoint or cfg.get('load_from')
    if args.launcher != 'none' and not cfg.load_from:  # DistributedDataParallel refuses a model that does not train
        cfg.setdefault('model_wrapper_cfg', dict(type='MMSeparateDistributedDataParallel'))
    try:
        if args.show or args.show_dir:
            draw_predictions(cfg, args.show, args.show_dir, args.wait_time)
        if args.out:
            save_predictions(cfg, args.out)
        if args.tta:
            augment(cfg)
    except ValueError as error:
        parser.error(str(error))
    runner = Runner.from_cfg(cfg)
    trained = next((name for name, parameter in runner.model.named_parameters() if parameter.requires_grad), None)
    if trained and not cfg.load_from:
        parser.error(f'the model has trainable parameters ({trained}, ...); give a checkpoint')
    return runner.test()


def draw_predictions(cfg: Config, show: bool, folder: str | None, wait_time: float) -> None:
    """Turn the hook on that draws predictions."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ValueError(
            '--show and --show-dir need a hook that draws; add '
            "default_hooks=dict(visualization=dict(type='SegVisualizationHook', interval=1)) to the config"
        )
    hook.draw = True
    if show:
        hook.update(show=True, wait_time=wait_time)
    if folder:
        cfg.visualizer.save_dir = folder


def save_predictions(cfg: Config, folder: str) -> None:
    """Let the first metric that can do so save the predicted label maps."""
    evaluator = cfg.test_evaluator
    metrics = [evaluator] if isinstance(evaluator, dict) else evaluator
    metric = next((metric for metric in metrics if issubclass(METRICS.get(metric.type), IoUMetric)), None)
    if metric is None:
        names = ', '.join(metric.type for metric in metrics)
        raise ValueError(f'--out needs an IoUMetric in test_evaluator, which has {names}')
    metric.output_dir = folder


def augment(cfg: Config) -> None:
    """Test with the pipeline and model of test-time augmentation."""
    if missing := [key for key in ('tta_pipeline', 'tta_model') if key not in cfg]:
        raise ValueError(f'--tta needs {" and ".join(missing)} in the config')
    for dataset in dataset_configs(cfg.test_dataloader.dataset):
        dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(cfg.tta_model, module=cfg.model)


if __name__ == '__main__':
    main()

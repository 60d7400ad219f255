"""Hooks: bit-exact resumption of interrupted runs, and pictures of training."""

import random
import re
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import barrier, get_rank, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner, set_random_seed
from mmseg.registry import HOOKS

from diffseg.models.necks import AggregationNeck, MixingWeights


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seed every training step from (seed, rank, iteration), separately from the random numbers of the data pipeline.

    Dropout and noise of a step then do not depend on how many steps this process has run. The states of the global
    generators (torch's, numpy's and Python's) that the data pipeline uses are saved and restored around steps and
    validation. `IterBasedTrainLoop` reads all earlier batches again on resuming, which brings them to the same state.

    `EpochBasedTrainLoop` does not read them again; there the generators of the data are seeded in every epoch from
    (seed, rank, epoch), and a run resumed from the end of an epoch is exact unless it has `persistent_workers`.

    Needs `randomness=dict(seed=...)`, as otherwise the sampler of a resumed run is built with another seed. On a GPU,
    results are bit-exact only with `deterministic=True` there. Gradients accumulated over iterations are not saved in
    checkpoints: the checkpoint interval must be a multiple of the number of accumulated iterations.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Warn if a resumed run could not be exact."""
        if runner.cfg.get('randomness', {}).get('seed') is None:
            runner.logger.warning(
                'The config has no randomness=dict(seed=...): a resumed run will read the data in another order.'
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed the data of an epoch; all iterations of `IterBasedTrainLoop` are one."""
        _seed(runner.seed, 0, runner.epoch)

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Save the state of the data's generators and seed a step."""
        self._data_state = _get_state()
        _seed(runner.seed, 1, runner.iter)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Restore the state of the data's generators."""
        _set_state(self._data_state)

    def before_val_epoch(self, runner: Runner) -> None:
        """Save the state of the training data's generators."""
        self._data_state = _get_state()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Restore the state of the training data's generators."""
        _set_state(self._data_state)


@HOOKS.register_module()
class CheckpointFallbackHook(Hook):
    """Resume from the newest complete checkpoint if the one named in `last_checkpoint` is incomplete.

    mmengine writes checkpoints in place, and with `save_best` writes the latest one twice, so that a run that is killed
    meanwhile leaves an incomplete file, or an empty `last_checkpoint`. With `max_keep_ckpts` it removes an old one
    before it writes: keep two or more.
    """

    def before_run(self, runner: Runner) -> None:
        """Correct the file `last_checkpoint`, which `resume` reads."""
        if runner.cfg.get('resume') and runner.cfg.get('load_from') is None and is_main_process():
            _repair(runner)
        barrier()


@HOOKS.register_module()
class MixingWeightsHook(Hook):
    """Draw the mixing weights of every level of every `AggregationNeck` in the model.

    The pictures (timesteps x layers) are passed to the runner's visualizer, whose backends write them: files in
    `vis_image` next to the log, TensorBoard, Weights & Biases. They are named `mixing_{neck}_level{i}`, with the neck's
    name in the model. Names of layers and timesteps are those of the neck (`layer_names`, `timestep_names`).

    Args:
        interval: iterations between pictures; the last iteration always has one.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: when training begins, if the model has no `AggregationNeck`.
    """

    priority = 'LOW'

    def __init__(self, interval: int = 1000) -> None:
        if find_spec('matplotlib') is None:
            raise ImportError(
                'MixingWeightsHook draws with matplotlib, which is not installed: pip install matplotlib, or leave '
                'the hook out of custom_hooks'
            )
        self.interval = interval

    def before_train(self, runner: Runner) -> None:
        """Check that the model has an `AggregationNeck`."""
        if not any(_mixing_weights(runner)):
            raise ValueError(
                'MixingWeightsHook finds no AggregationNeck in the model; leave the hook out of custom_hooks'
            )

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Draw."""
        due = self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner)
        if due and is_main_process():
            from diffseg.visualization import mixing_figure, render  # need matplotlib

            for name, table in _mixing_weights(runner):
                figure = mixing_figure(table.weights, table.timesteps, table.layers)
                runner.visualizer.add_image(f'mixing_{name}', render(figure), runner.iter + 1)


def _mixing_weights(runner: Runner) -> Iterator[tuple[str, MixingWeights]]:
    """Name and mixing weights of each level of the necks in a runner's model."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    for name, neck in model.named_modules():
        if isinstance(neck, AggregationNeck):
            for level, table in enumerate(neck.mixing_weights()):
                yield f'{name}_level{level}', table


def _repair(runner: Runner) -> None:
    pointer = Path(runner.work_dir, 'last_checkpoint')
    if not pointer.is_file() or _is_complete(named := Path(pointer.read_text().strip())):
        return
    folder = named.parent if named.name else pointer.parent
    steps = {path: re.fullmatch(r'(?:iter|epoch)_(\d+)', path.stem) for path in folder.glob('*.pth')}
    complete = {path: int(step[1]) for path, step in steps.items() if step and _is_complete(path)}
    if complete:
        newest = max(complete, key=complete.get)
        runner.logger.warning(f'{named} is missing or incomplete; resuming from {newest}.')
        pointer.write_text(str(newest))


def _is_complete(checkpoint: Path) -> bool:
    """Whether a file has the directory of a zip archive at its end, as complete files of `torch.save` have."""
    return zipfile.is_zipfile(checkpoint)


def _seed(seed: int, *key: int) -> None:
    """Seed the global generators of Python, numpy and torch (all devices)."""
    set_random_seed(int(np.random.SeedSequence((seed, get_rank(), *key)).generate_state(1)[0]))


def _get_state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_state(state: tuple[Any, ...]) -> None:
    python, numpy, cpu = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)

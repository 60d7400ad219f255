"""Hooks around the evaluation of pairs: no selection on the test split, result files, and interrupted evaluations."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from mmengine.dist import barrier, get_rank, is_main_process
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.registry import HOOKS

from diffseg.structures import PairSample

from .davis import DAVISMetric
from .homography import HomographyMetric
from .pck import PCKMetric


@HOOKS.register_module()
class SelectionGuardHook(Hook):
    """Refuse to choose a checkpoint, or when to stop, by PCK on the test split.

    `PCKMetric(allow_selection_on_test=True)` in the `val_evaluator` asks for it, and its results say so.
    """

    def before_train(self, runner: Runner) -> None:
        """Check what the run selects by.

        Raises:
            ValueError: the test split.
        """
        by = [
            hook
            for hook in runner.hooks
            if isinstance(hook, EarlyStoppingHook) or (isinstance(hook, CheckpointHook) and hook.save_best)
        ]
        if not by or runner.val_loop is None:
            return
        split = getattr(runner.val_dataloader.dataset, 'metainfo', {}).get('split')
        refusing = [
            metric
            for metric in runner.val_evaluator.metrics
            if isinstance(metric, PCKMetric) and not metric.allow_selection_on_test
        ]
        if split == 'test' and refusing:
            raise ValueError(
                f'{type(by[0]).__name__} would select by figures on the test split; validate on the split val, or '
                f'set allow_selection_on_test=True in the PCKMetric of val_evaluator, which is then written into its '
                f'results'
            )


@HOOKS.register_module()
class ResultFileHook(Hook):
    """Put the result files of metrics into the work dir, where their paths are relative."""

    def before_test(self, runner: Runner) -> None:
        """Complete the paths."""
        for metric in runner.test_evaluator.metrics:
            if isinstance(metric, (DAVISMetric, HomographyMetric, PCKMetric)) and metric.out_file is not None:
                metric.out_file = str(Path(runner.work_dir, metric.out_file).absolute())


@HOOKS.register_module()
class ResumableTestHook(Hook):
    """Keep the predictions of a test on pairs, so that one that was interrupted goes on where it was.

    Predictions are appended to a file as they are made, below a line that says by what model and on what data. The next
    test with the same model and data takes them from there, and its result is that of an undisturbed one. The files
    are deleted when a test is complete.

    Args:
        folder: where the files lie; by default `predictions` in the work dir.

    Raises:
        ValueError: before testing, if the files belong to another model or other data.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._known: dict[str, list[list[float]]] = {}  # pair_id -> pred_keypoints1
        self._file: TextIO

    def before_test_epoch(self, runner: Runner) -> None:
        """Read what is there."""
        folder = self._folder(runner)
        folder.mkdir(parents=True, exist_ok=True)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        data = {key: runner.test_dataloader.dataset.metainfo.get(key) for key in ('dataset', 'split', 'list')}
        header = json.loads(json.dumps({**data, **model.protocol}))
        self._known = {}
        for path in sorted(folder.glob('*.jsonl')):
            found, *predictions = _read(path) or [header]
            if different := sorted(key for key in {**header, **found} if header.get(key) != found.get(key)):
                raise ValueError(
                    f'{path} holds predictions of another test, which differs in {", ".join(different)}; delete the '
                    f'folder, or choose another work dir'
                )
            self._known |= {each['pair_id']: each['predicted'] for each in predictions}
        barrier()  # all have read before one writes
        runner.logger.info(f'{len(self._known)} predictions were found in {folder}')
        path = folder / f'{get_rank()}.jsonl'
        self._file = path.open('a', encoding='utf-8')
        if not path.stat().st_size:
            self._write(header)

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Mapping[str, Any] | None = None) -> None:
        """Complete the samples whose prediction is known; the model leaves them as they are."""
        for sample in data_batch['data_samples']:
            if sample.pair_id in self._known:
                known = torch.tensor(self._known[sample.pair_id], dtype=torch.float64)
                sample.pred_keypoints1 = known.reshape(-1, 2)

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Mapping[str, Any] | None = None,
        outputs: Sequence[PairSample] | None = None,
    ) -> None:
        """Keep the predictions that are new."""
        for sample in outputs:
            if sample.pair_id not in self._known and 'damaged' not in sample:
                self._write({'pair_id': sample.pair_id, 'predicted': sample.pred_keypoints1.tolist()})

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Delete the files, as the figures are known."""
        self._file.close()
        barrier()
        if is_main_process():
            shutil.rmtree(self._folder(runner))

    def _folder(self, runner: Runner) -> Path:
        return Path(self.folder or Path(runner.work_dir, 'predictions'))

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + '\n')
        self._file.flush()


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; what was written of the last one when the writer was killed is cut off."""
    whole, newline, _ = path.read_bytes().rpartition(b'\n')
    with path.open('r+b') as file:
        file.truncate(len(whole + newline))
    return [json.loads(line) for line in whole.splitlines()]

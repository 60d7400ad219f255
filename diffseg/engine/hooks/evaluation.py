"""Hooks around the evaluation of pairs: no selection on the test split, result files, and interrupted evaluations."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from mmengine.dist import barrier, get_rank, is_main_process
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.registry import HOOKS

from diffseg.evaluation import DAVISMetric, HomographyMetric, PCKMetric, TextMaskIoUMetric
from diffseg.models import CorrespondenceModel
from diffseg.structures import PairSample

WITH_RESULT_FILE = (DAVISMetric, HomographyMetric, PCKMetric, TextMaskIoUMetric)
FILES = 'test-predictions-'  # prefix of the files of ResumableTestHook
PREDICTED = ('pred_keypoints1', 'pred_keypoints1_aligned', 'cycle_error')  # fields that it stores, if predicted


@HOOKS.register_module()
class SelectionGuardHook(Hook):
    """Refuse checkpoint selection and early stopping by PCK on the test split.

    `PCKMetric(allow_selection_on_test=True)` in the `val_evaluator` allows it, which is recorded in the results.
    """

    def before_train(self, runner: Runner) -> None:
        """Check the data that the run selects by.

        Raises:
            ValueError: they are the test split.
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
                f'set allow_selection_on_test=True in the PCKMetric of val_evaluator, which is recorded in its '
                f'results'
            )


@HOOKS.register_module()
class ResultFileHook(Hook):
    """Put the result files of metrics into the work dir, where their paths are relative."""

    def before_test(self, runner: Runner) -> None:
        """Prepend the work dir to relative paths."""
        for metric in runner.test_evaluator.metrics:
            if isinstance(metric, WITH_RESULT_FILE) and metric.out_file is not None:
                metric.out_file = str(Path(runner.work_dir, metric.out_file).absolute())


@HOOKS.register_module()
class ResumableTestHook(Hook):
    """Store the predictions of a test on pairs, so that an interrupted test can be resumed.

    Each process appends its predictions to a file `FOLDER/test-predictions-RANK.jsonl` as they are made, below a header
    with the model's protocol and digests of the configs of the data set (its pipeline included), of the evaluator and
    of the data preprocessor. The next test with the same header reads them, and its result is that of an uninterrupted
    one. The files are deleted when a test is complete; other files in the folder are kept.

    Batch size, workers and number of processes may change in between.

    Args:
        folder: of the files; by default `predictions` in the work dir, which is deleted as well once it is empty.

    Raises:
        ValueError: before testing, if the model is not a `CorrespondenceModel`, the runner was built without a config,
            or the files belong to another model, other data or another evaluator, or cannot be read.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._predictions: dict[str, dict[str, list]] = {}  # pair_id -> predicted fields
        self._file: TextIO

    def before_test_epoch(self, runner: Runner) -> None:
        """Read the predictions of an interrupted test."""
        folder = self._folder(runner)
        folder.mkdir(parents=True, exist_ok=True)
        header = _header(runner)
        self._predictions = {}
        for path in _prediction_files(folder):
            stored, *predictions = _read(path) or [header]
            if different := sorted(key for key in {**header, **stored} if header.get(key) != stored.get(key)):
                raise ValueError(
                    f'{path} holds predictions of another test, which differs in {", ".join(different)}; delete the '
                    f'file, or choose another work dir'
                )
            self._predictions |= {line.pop('pair_id'): line for line in predictions}
        barrier()  # no process writes before all have read
        if self._predictions:
            runner.logger.info(f'{len(self._predictions)} predictions of an interrupted test are taken from {folder}')
        path = folder / f'{FILES}{get_rank()}.jsonl'
        self._file = path.open('a', encoding='utf-8')
        if not path.stat().st_size:
            self._write(header)

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Mapping[str, Any] | None = None) -> None:
        """Add stored predictions to samples; the model skips these samples."""
        for sample in data_batch['data_samples']:
            if sample.pair_id in self._predictions:
                for name, values in self._predictions[sample.pair_id].items():
                    field = torch.tensor(values, dtype=torch.float64)
                    sample.set_field(field.reshape(-1, 2) if 'keypoints' in name else field, name)

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Mapping[str, Any] | None = None,
        outputs: Sequence[PairSample] | None = None,
    ) -> None:
        """Write new predictions."""
        for sample in outputs:
            if sample.pair_id not in self._predictions and 'damaged' not in sample:
                fields = {name: sample.get(name).tolist() for name in PREDICTED if name in sample}
                self._write({'pair_id': sample.pair_id, **fields})

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Delete the files of the completed test."""
        self._file.close()
        barrier()
        if is_main_process():
            folder = self._folder(runner)
            for path in _prediction_files(folder):
                path.unlink()
            if self.folder is None and not any(folder.iterdir()):
                folder.rmdir()

    def _folder(self, runner: Runner) -> Path:
        return Path(self.folder or Path(runner.work_dir, 'predictions'))

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + '\n')
        self._file.flush()


def _header(runner: Runner) -> dict[str, Any]:
    """Everything that predictions depend on, ready for JSON.

    Raises:
        ValueError: the model is not a `CorrespondenceModel`, or the runner has no config.
    """
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if not isinstance(model, CorrespondenceModel):
        raise ValueError(
            f'ResumableTestHook keeps the keypoints that a CorrespondenceModel predicts, and the model is a '
            f'{type(model).__name__}; leave the hook out of custom_hooks'
        )
    if 'test_dataloader' not in runner.cfg:
        raise ValueError(
            'ResumableTestHook compares configs, and the runner has none; build it with Runner.from_cfg, or leave the '
            'hook out of custom_hooks'
        )
    dataset = runner.test_dataloader.dataset
    configs = {
        'test_dataset': runner.cfg.test_dataloader.get('dataset'),
        'test_evaluator': runner.cfg.get('test_evaluator'),
        'data_preprocessor': runner.cfg.model.get('data_preprocessor'),
    }
    header = {
        **{key: dataset.metainfo.get(key) for key in ('dataset', 'split', 'list')},
        'pairs': len(dataset),
        **{f'{name} config': config_digest(config) for name, config in configs.items()},
        **model.protocol,
    }
    return json.loads(json.dumps(header))


def config_digest(config: Any) -> str:
    """Digest of a part of a config that does not depend on the order of its keys.

    Classes and functions are represented by their names, other objects by their `repr`.
    """

    def encode(value: Any) -> str:
        name = getattr(value, '__qualname__', None)
        return repr(value) if name is None else f'{value.__module__}.{name}'

    return f'sha256:{hashlib.sha256(json.dumps(config, sort_keys=True, default=encode).encode()).hexdigest()[:16]}'


def _prediction_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f'{FILES}*.jsonl'))


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; an incomplete last line, of a killed writer, is dropped.

    Raises:
        ValueError: a complete line was not written by the hook.
    """
    whole, newline, _ = path.read_bytes().rpartition(b'\n')
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        if not all({'pair_id', PREDICTED[0]} <= set(line) for line in lines[1:]):
            raise ValueError('a line has no prediction')
    except ValueError as error:
        raise ValueError(f'{path} is damaged ({error}); delete it, and its pairs are predicted again') from error
    with path.open('r+b') as file:
        file.truncate(len(whole + newline))
    return lines

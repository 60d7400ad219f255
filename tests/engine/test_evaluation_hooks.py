"""What the hooks around an evaluation refuse; the tools' tests run them."""

from types import SimpleNamespace

import pytest
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, IterTimerHook

from diffseg.engine import ResultFileHook, SelectionGuardHook
from diffseg.evaluation import PCKMetric, ScarceIoUMetric

SAVE_BEST = CheckpointHook(save_best='PCK@0.1-bbox/point', rule='greater')
STOP = EarlyStoppingHook('PCK@0.1-bbox/point', rule='greater')
ASKED_FOR = PCKMetric(allow_selection_on_test=True)


def make_runner(hook, split, metric):
    dataset = SimpleNamespace(metainfo={'split': split})
    return SimpleNamespace(
        hooks=[IterTimerHook(), hook],
        val_loop=object(),
        val_dataloader=SimpleNamespace(dataset=dataset),
        val_evaluator=SimpleNamespace(metrics=[metric]),
    )


@pytest.mark.parametrize('hook', [SAVE_BEST, STOP])
def test_selection_on_test_is_refused(hook):
    with pytest.raises(ValueError, match=f'{type(hook).__name__} would select by figures on the test split'):
        SelectionGuardHook().before_train(make_runner(hook, 'test', PCKMetric()))


@pytest.mark.parametrize(
    ('hook', 'split', 'metric'),
    [
        (SAVE_BEST, 'val', PCKMetric()),
        (SAVE_BEST, 'test', ASKED_FOR),
        (CheckpointHook(), 'test', PCKMetric()),
        (SAVE_BEST, 'test', ScarceIoUMetric()),
    ],
    ids=['val', 'allowed', 'no selection', 'another metric'],
)
def test_all_else_is_allowed(hook, split, metric):
    SelectionGuardHook().before_train(make_runner(hook, split, metric))


def test_a_run_without_validation_is_allowed():
    runner = make_runner(SAVE_BEST, 'test', PCKMetric())
    runner.val_loop = None
    SelectionGuardHook().before_train(runner)


def test_relative_result_files_are_in_the_work_dir(tmp_path):
    metrics = [PCKMetric(out_file='pck.json'), PCKMetric(out_file='/results/pck.json'), PCKMetric(), ScarceIoUMetric()]
    runner = SimpleNamespace(work_dir=str(tmp_path), test_evaluator=SimpleNamespace(metrics=metrics))
    ResultFileHook().before_test(runner)
    assert [metric.out_file for metric in metrics[:3]] == [str(tmp_path / 'pck.json'), '/results/pck.json', None]

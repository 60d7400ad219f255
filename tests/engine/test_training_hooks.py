"""Tests for diffseg.engine.hooks, on a regression whose steps and data draw from every generator."""

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from diffseg.engine.hooks import CheckpointFallbackHook, IterationSeedHook

STEPS = 6


class Numbers(Dataset):
    """Five vectors, augmented with noise from all three generators."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {'x': index + random.random() + np.random.rand() + torch.rand(4)}


class Regression(BaseModel):
    """A linear layer after dropout; a step draws from all generators."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, mode: str = 'tensor') -> dict | list:
        y = self.layer(torch.dropout(x, 0.5, train=True))
        y = y * (random.random() + np.random.rand())
        return {'loss': y.square().mean()} if mode == 'loss' else list(y)


class Mean(BaseMetric):
    def process(self, data_batch: list, data_samples: list) -> None:
        self.results += [x.item() for x in data_samples]

    def compute_metrics(self, results: list) -> dict[str, float]:
        return {'mean': float(np.mean(results))}


@pytest.fixture
def train(request: pytest.FixtureRequest, tmp_path: Path):
    """`train(steps, work_dir, ...)` trains up to that step and returns the weights."""
    count = iter(range(100))

    def run(steps: int, work_dir: str, *, hooked: bool = True, loop: str = 'Iter', workers: int = 0, resume=False):
        torch.manual_seed(0)
        by_epoch = loop == 'Epoch'
        loader = {
            'dataset': Numbers(),
            'batch_size': 2,
            'num_workers': workers,
            'collate_fn': {'type': 'default_collate'},
            'sampler': {'type': 'DefaultSampler', 'shuffle': True},
        }
        if not by_epoch:
            loader['sampler'] = {'type': 'InfiniteSampler'}
        length = {'max_epochs': steps // 3, 'val_interval': 1} if by_epoch else {'max_iters': steps, 'val_interval': 2}
        runner = Runner(
            Regression(),
            str(tmp_path / work_dir),
            train_dataloader=loader,
            val_dataloader={**loader, 'sampler': {'type': 'DefaultSampler', 'shuffle': False}},
            val_evaluator=[Mean()],
            train_cfg={'type': f'{loop}BasedTrainLoop', **length},
            val_cfg={},
            optim_wrapper={'optimizer': {'type': 'AdamW', 'lr': 0.01}},
            default_hooks={'checkpoint': {'type': 'CheckpointHook', 'interval': 1, 'by_epoch': by_epoch}},
            custom_hooks=[{'type': 'mmseg.IterationSeedHook'}] if hooked else [],
            randomness={'seed': 3},
            resume=resume,
            log_level='ERROR',
            experiment_name=f'{request.node.name}{next(count)}',
            cfg={'randomness': {'seed': 3}},
        )
        runner.train()
        vars(runner.train_loop).pop('dataloader_iterator', None)  # ends its workers, at once
        return runner.model.layer.weight.detach().clone()

    return run


@pytest.mark.parametrize(('loop', 'workers'), [('Iter', 0), ('Iter', 2), ('Epoch', 0), ('Epoch', 2)])
def test_resumed_run_equals_the_undisturbed_one(train, loop: str, workers: int):
    undisturbed = train(STEPS, 'whole', loop=loop, workers=workers)
    half = train(STEPS // 2, 'parts', loop=loop, workers=workers)
    resumed = train(STEPS, 'parts', loop=loop, workers=workers, resume=True)
    assert not torch.equal(half, undisturbed)
    assert torch.equal(resumed, undisturbed)


def test_without_the_hook_it_does_not(train):
    undisturbed = train(STEPS, 'whole', hooked=False)
    train(STEPS // 2, 'parts', hooked=False)
    assert not torch.equal(train(STEPS, 'parts', hooked=False, resume=True), undisturbed)


def test_steps_differ_and_depend_on_the_seed():
    def draws(seed: int, iteration: int) -> tuple[float, ...]:
        hook = IterationSeedHook()
        hook.before_train_iter(SimpleNamespace(seed=seed, iter=iteration))
        found = random.random(), np.random.rand(), torch.rand(()).item()
        hook.after_train_iter(None)
        return found

    assert draws(0, 5) == draws(0, 5)
    several = [draws(seed, iteration) for seed in (0, 1) for iteration in (0, 1)]
    assert all(len(set(values)) == 4 for values in zip(*several, strict=True))


def fallback(work_dir: Path, **cfg) -> str:
    logger = MMLogger.get_current_instance()
    runner = SimpleNamespace(cfg={'resume': True, **cfg}, work_dir=str(work_dir), logger=logger)
    CheckpointFallbackHook().before_run(runner)
    return (work_dir / 'last_checkpoint').read_text()


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    """Four checkpoints, the newest cut off, and a best one without the optimizer's state."""
    for name in ('iter_9', 'iter_10', 'iter_20', 'best_mIoU_iter_20'):
        torch.save({'meta': name, 'weights': torch.zeros(1000)}, tmp_path / f'{name}.pth')
    newest = tmp_path / 'iter_20.pth'
    newest.write_bytes(newest.read_bytes()[:-100])
    (tmp_path / 'last_checkpoint').write_text(str(newest))
    return tmp_path


@pytest.mark.parametrize('named', ['iter_20.pth', 'iter_30.pth', None])
def test_fallback_to_the_newest_whole_checkpoint(work_dir: Path, named: str | None):
    """The one that is named is cut off, is gone, or its name was not written."""
    (work_dir / 'last_checkpoint').write_text(str(work_dir / named) if named else '')
    assert fallback(work_dir) == str(work_dir / 'iter_10.pth')


def test_a_whole_checkpoint_is_kept_and_so_is_a_choice_of_the_user(work_dir: Path):
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'iter_9.pth'))
    assert fallback(work_dir) == str(work_dir / 'iter_9.pth')
    (work_dir / 'last_checkpoint').write_text('absent.pth')
    assert fallback(work_dir, load_from='other.pth') == 'absent.pth'
    assert fallback(work_dir, resume=False) == 'absent.pth'

"""Training that is killed at random moments and resumed by tools/train.py ends in the bits of an undisturbed run."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu import GPU
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from PIL import Image
from processes import forkserver, run_script
from tiny_mmseg import CLASSES, segmentor_config

ROOT = Path(__file__).parents[2]
CHECKPOINTS = (2, 4, 6, 8)  # after so many iterations


@pytest.fixture(scope='module')
def start() -> Iterator[Callable[..., BaseProcess]]:
    """`start(device, *arguments)` starts tools/train.py in its own process, forked from one that did the imports."""
    context = forkserver()
    with pytest.MonkeyPatch.context() as patch:

        def run(device: str, *arguments: str | Path) -> BaseProcess:
            script = str(ROOT / 'tools' / 'train.py')
            patch.setattr(sys, 'argv', [script, *map(str, arguments)])
            process = context.Process(target=run_script, args=(script, device))
            process.start()
            return process

        yield run


@pytest.fixture
def configure(tiny_pipeline: Path, tmp_path: Path) -> Callable[..., Path]:
    """`configure(device, workers, **backbone)` writes the config of a segmentor with dropout and flips."""

    def write(device: str, workers: int, **backbone: Any) -> Path:
        generator = np.random.default_rng(0)
        for kind, shape, values in (('images', (64, 96, 3), 256), ('labels', (64, 96), CLASSES)):
            (tmp_path / kind).mkdir()
            for index in range(5):
                pixels = generator.integers(values, size=shape, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / kind / f'{index}.png')
        model = segmentor_config(tiny_pipeline, {'timesteps': [50], 'train_noise': 'random', **backbone})
        model['neck']['timesteps'] = 1
        model['decode_head']['dropout_ratio'] = 0.5
        config = Config.fromfile(ROOT / 'configs' / '_base_' / 'default_runtime.py')
        config.merge_from_dict(
            {
                'model': model,
                'randomness': {'deterministic': device != 'cpu'},  # sums of a GPU have no order otherwise
                'train_dataloader': {
                    'batch_size': 2,
                    'num_workers': workers,
                    'sampler': {'type': 'InfiniteSampler'},
                    'dataset': {
                        'type': 'BaseSegDataset',
                        'data_root': str(tmp_path),
                        'data_prefix': {'img_path': 'images', 'seg_map_path': 'labels'},
                        'img_suffix': '.png',
                        'metainfo': {'classes': list('abc'), 'palette': [[i, i, i] for i in range(CLASSES)]},
                        'pipeline': [
                            {'type': 'LoadImageFromFile'},
                            {'type': 'LoadAnnotations'},
                            {'type': 'RandomFlip', 'prob': 0.5},
                            {'type': 'PackSegInputs'},
                        ],
                    },
                },
                'optim_wrapper': {'type': 'OptimWrapper', 'optimizer': {'type': 'AdamW', 'lr': 1e-3}},
                'param_scheduler': [{'type': 'PolyLR', 'end': CHECKPOINTS[-1], 'by_epoch': False}],
                'train_cfg': {'type': 'IterBasedTrainLoop', 'max_iters': CHECKPOINTS[-1]},
                'default_hooks': {
                    'checkpoint': {'type': 'CheckpointHook', 'by_epoch': False, 'interval': CHECKPOINTS[0]}
                },
            }
        )
        config.dump(tmp_path / 'config.py')
        return tmp_path / 'config.py'

    return write


def leaves(tree: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    """All values in nested dicts and lists, tensors as their bytes."""
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f'{path}/{key}')
    else:
        yield path, tree.numpy().tobytes() if isinstance(tree, torch.Tensor) else tree


def read(checkpoint: Path) -> dict[str, Any]:
    """Weights, moments of the optimizer and states of the schedulers."""
    content = CheckpointLoader.load_checkpoint(str(checkpoint), map_location='cpu')
    return dict(leaves({key: content[key] for key in ('state_dict', 'optimizer', 'param_schedulers')}))


@pytest.mark.parametrize(
    ('device', 'kills', 'workers', 'backbone'),
    [
        pytest.param('cpu', 1, 2, {'lora': {'r': 2}}, id='lora'),
        pytest.param('cuda', 1, 0, {'lora': {'r': 2}}, id='on a GPU', marks=GPU),
    ],
)
def test_killed_and_resumed(
    start: Callable, configure: Callable, tmp_path: Path, device: str, kills: int, workers: int, backbone: dict
):
    config, whole, parts = configure(device, workers, **backbone), tmp_path / 'whole', tmp_path / 'parts'
    undisturbed = start(device, config, '--work-dir', whole)
    undisturbed.join()
    assert undisturbed.exitcode == 0
    times = [(whole / f'iter_{i}.pth').stat().st_mtime for i in CHECKPOINTS]

    seed = random.SystemRandom().getrandbits(32)
    print(f'seed of the moments: {seed}')
    moments = random.Random(seed)
    for step in sorted(moments.sample(CHECKPOINTS[:-2], kills)):
        run = start(device, config, '--work-dir', parts, '--resume')
        while run.is_alive() and not (parts / f'iter_{step}.pth').exists():
            time.sleep(0.002)
        time.sleep(moments.uniform(0, min(b - a for a, b in pairwise(times))))
        run.kill()
        run.join()
        assert run.exitcode == -signal.SIGKILL
    pointer, first = parts / 'last_checkpoint', parts / f'iter_{CHECKPOINTS[0]}.pth'
    begun, resumable = first.stat().st_mtime_ns, pointer.exists()
    named = Path(pointer.read_text()) if resumable else first
    if named.is_file() and named != first:
        os.truncate(named, named.stat().st_size // 2)  # as if killed while `save_best` writes it again

    resumed = start(device, config, '--work-dir', parts, '--resume')
    resumed.join()
    assert resumed.exitcode == 0
    assert (first.stat().st_mtime_ns == begun) == resumable
    expected, found = (read(folder / f'iter_{CHECKPOINTS[-1]}.pth') for folder in (whole, parts))
    assert [name for name in {**expected, **found} if expected.get(name) != found.get(name)] == []
    before = read(whole / f'iter_{CHECKPOINTS[0]}.pth')
    assert sum(expected[name] != before[name] for name in expected) > len(expected) / 2

"""MixingWeightsHook: pictures where mmengine's visualizer writes them, from any model."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from mmseg.registry import MODELS
from PIL import Image

import diffseg.visualization
from diffseg.engine.hooks import MixingWeightsHook

NECK = {
    'type': 'AggregationNeck',
    'levels': [[4, 4], [4]],
    'timesteps': 2,
    'out_channels': 16,
    'num_groups': 2,
    'layer_names': [['a', 'b'], ['c']],
    'timestep_names': [50, 261],
}


class Model(BaseModel):
    """A neck in a sequence of necks, on random maps."""

    def __init__(self, neck: dict | None = NECK):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        if neck is not None:
            self.neck = MODELS.build({'type': 'NeckSequence', 'necks': [neck]})

    def forward(self, x: list[torch.Tensor], mode: str = 'tensor') -> dict:
        x = torch.stack(x)  # (B, T*C, h, w)
        levels = self.neck([x, x, x[..., :4, :4]])
        return {'loss': self.scale * sum(level.square().mean() * i for i, level in enumerate(levels, 1))}


def train(model: torch.nn.Module, work_dir: Path, steps: int = 3, interval: int = 2) -> None:
    Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader={
            'dataset': [{'x': torch.randn(8, 8, 8)} for _ in range(4)],
            'batch_size': 2,
            'sampler': {'type': 'InfiniteSampler'},
        },
        train_cfg={'type': 'IterBasedTrainLoop', 'max_iters': steps},
        optim_wrapper={'optimizer': {'type': 'SGD', 'lr': 1.0}},
        custom_hooks=[{'type': 'MixingWeightsHook', 'interval': interval}],
        default_hooks={'checkpoint': None, 'logger': None},
        visualizer={'type': 'Visualizer', 'vis_backends': [{'type': 'LocalVisBackend'}], 'name': work_dir.name},
        default_scope='mmseg',
        experiment_name=work_dir.name,
    ).train()


def test_a_picture_of_each_level_at_the_interval_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = []
    real = diffseg.visualization.mixing_figure
    monkeypatch.setattr('diffseg.visualization.mixing_figure', lambda *args: drawn.append(args) or real(*args))
    model = Model()
    train(model, tmp_path / 'run')
    files = {path.name: path for path in tmp_path.glob('run/*/vis_data/vis_image/*')}
    names = [f'mixing_neck.necks.0_level{level}' for level in (0, 1)]
    assert sorted(files) == sorted(f'{name}_{step}.png' for name in names for step in (2, 3))
    first, last = (np.asarray(Image.open(files[f'{names[0]}_{step}.png'])) for step in (2, 3))
    assert first.shape == last.shape and first.ndim == 3 and (first != last).any()
    assert [args[1:] for args in drawn[:2]] == [(('50', '261'), ('a', 'b')), (('50', '261'), ('c',))]
    assert torch.equal(drawn[-1][0], model.neck.necks[0].mixing_weights()[1].weights)


def test_a_wrapped_model(tmp_path: Path):
    dist.init_process_group('gloo', f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        train(MMDistributedDataParallel(Model()), tmp_path / 'wrapped', steps=1)
    finally:
        dist.destroy_process_group()
    files = {path.name for path in tmp_path.glob('wrapped/*/vis_data/vis_image/*')}
    assert files == {'mixing_neck.necks.0_level0_1.png', 'mixing_neck.necks.0_level1_1.png'}


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match='finds no AggregationNeck'):
        train(Model(neck=None), tmp_path / 'none')
    monkeypatch.setattr('diffseg.engine.hooks.training.find_spec', lambda name: None)
    with pytest.raises(ImportError, match='pip install matplotlib'):
        MixingWeightsHook()

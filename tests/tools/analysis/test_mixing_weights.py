"""Tables and pictures of mixing weights, from checkpoints with and without a config."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from PIL import Image
from torch import nn

from diffseg.inspection import AGGREGATION_NECKS
from diffseg.models import AggregationNeck

FINE = {'type': 'AggregationNeck', 'levels': [[4, 4], [4]], 'timesteps': 2, 'out_channels': 16, 'num_groups': 2}
PRUNED = {**FINE, 'levels': [[4]], 'kept': [[[1]]], 'layer_names': [['vit-out']], 'timestep_names': [50, 261]}
MODEL = {
    'type': 'Anything',
    'scale': ({'a-b': -1.5}, 'x'),
    'members': [{'neck': {'type': 'NeckSequence', 'necks': [FINE]}}, {'neck': PRUNED}],
}


@pytest.fixture
def main(load_tool: Callable) -> Callable[..., int]:
    return load_tool('analysis/mixing_weights').main


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    parts = [nn.ModuleDict({'neck': MODELS.build(member['neck'])}) for member in MODEL['members']]
    parts[0]['neck'].necks[0].levels[0].mixing_weights.data = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    return nn.ModuleDict({'members': nn.ModuleList(parts)}).state_dict()


def save(path: Path, state: dict, text: str | None = None) -> Path:
    torch.save({'state_dict': state, 'meta': {} if text is None else {'cfg': text}}, path)
    return path


def test_tables_and_picture(main: Callable, state: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    config = Config({'model': MODEL, 'limit': -1})
    config.dump(tmp_path / 'config.py')
    alone = save(tmp_path / 'alone.pth', state, config.pretty_text)
    bare = save(tmp_path / 'bare.pth', state)
    outputs = []
    for arguments in ([alone], [bare, tmp_path / 'config.py']):
        out = tmp_path / 'pictures' / f'{len(outputs)}.png'
        assert main([*map(str, arguments), '--out', str(out)]) == 0
        outputs.append(capsys.readouterr().out.replace(str(out), ''))
    assert outputs[0] == outputs[1]
    assert 'members.0.neck.necks.0, level 0\n         step 0  step 1\nlayer 0  0.1000  0.3000' in outputs[0]
    assert 'members.1.neck, level 0\n             50     261\nvit-out  0.0000  1.0000' in outputs[0]
    first, second = (np.asarray(Image.open(tmp_path / 'pictures' / f'{i}.png')) for i in (0, 1))
    assert np.array_equal(first, second) and first.std() > 20


def test_a_stored_config_is_not_run(main: Callable, state: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    for statement in ('model = open("{0}", "w")', 'import os\nopen("{0}", "w")\nmodel = dict(type="X")'):
        path = tmp_path / 'written'
        assert main([str(save(tmp_path / 'a.pth', state, statement.format(path)))]) == 2
        assert not path.exists()
    assert 'error: ' in capsys.readouterr().err


def test_every_neck_that_mixes_is_known_by_its_name():
    derived = [name for name, kind in MODELS.module_dict.items() if issubclass(kind, AggregationNeck)]
    assert sorted(derived) == sorted(AGGREGATION_NECKS)


@pytest.mark.parametrize('kind', ['GatedAggregationNeck', 'UpsamplingNeck'])
def test_necks_derived_from_it(main: Callable, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    config = {'neck': {**FINE, 'type': kind}}
    neck = MODELS.build(config['neck'])
    for level in neck.levels:
        if kind == 'GatedAggregationNeck':
            level.mean_weights.copy_(torch.tensor([[0.1, 0.3], [0.2, 0.4]])[:, : level.mean_weights.shape[1]])
        else:
            nn.init.normal_(level.mixing_weights)
    state = nn.ModuleDict({'neck': neck}).state_dict()
    assert main([str(save(tmp_path / 'a.pth', state, Config({'model': config}).pretty_text))]) == 0
    assert str(neck.mixing_weights()[0]) in capsys.readouterr().out


def test_errors(main: Callable, state: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    def error(*arguments: Path) -> str:
        assert main([*map(str, arguments)]) == 2
        return capsys.readouterr().err

    (tmp_path / 'none.py').write_text("model = dict(type='X')")
    Config({'model': {'neck': FINE}}).dump(tmp_path / 'other.py')
    bare = save(tmp_path / 'bare.pth', state)
    assert 'holds no config; give CONFIG' in error(bare)
    assert 'has no AggregationNeck' in error(bare, tmp_path / 'none.py')
    assert 'does not fit neck in the config' in error(bare, tmp_path / 'other.py')
    assert 'missing.pth' in error(tmp_path / 'missing.pth')
    torch.save({'state_dict': state, 'meta': {'cfg': Path}}, tmp_path / 'code.pth')
    assert 'error: ' in error(tmp_path / 'code.pth')

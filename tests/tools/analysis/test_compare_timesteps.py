"""What timesteps know: figures of hand-made rows, linear shares of known mixtures, and a run on toy pairs."""

import pytest
import torch
from mmengine.config import Config

LAYER = 'up-level3-repeat0-vit-block0-self-k'  # 32 channels


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('analysis/compare_timesteps')


def test_oracles_by_hand(tool):
    rows = [[[True, True, False], [False]], [[True, False, False], [True]]]  # of each, of each pair
    lines = tool.report(['a', 'b'], [[torch.tensor(pair) for pair in row] for row in rows]).splitlines()
    assert lines[2:4] == ['| a | 50.00 | 0.00 |', '| b | 50.00 | 0.00 |']
    assert lines[5:] == [
        'mean correlation: 0.00',
        'best alone: 50.00',
        'majority: 25.00',
        'oracle for each pair: 75.00',
        'oracle for each keypoint: 75.00; of independent ones: 75.00',
    ]


def test_linear_shares_of_known_mixtures(tool):
    products, mixture = tool.Products(3), torch.randn(2, 2)
    for _ in range(8):
        first, second = torch.randn(2, 4, 2, 10, 10).unbind(2)[0].split(2, dim=1)
        third = 0.6 * torch.einsum('oc,bchw->bohw', mixture, first) + 5
        products.add([torch.cat([first, second, third], dim=1)])
    assert products.explained(2, [0]) == pytest.approx(1, abs=0.01)
    assert products.explained(2, [1]) == pytest.approx(0, abs=0.05)
    assert products.explained(2, [0, 1]) == pytest.approx(1, abs=0.01)
    assert products.explained(1, [0, 2]) == pytest.approx(0, abs=0.05)
    maps = [torch.arange(12.0).view(1, 6, 1, 2)]
    assert torch.equal(tool.alone(maps, 1, 3)[0], maps[0][:, 2:4].repeat(1, 3, 1, 1))


def test_timesteps_and_draws_on_toy_pairs(tool, load_tool, tiny_pipeline, tmp_path, capsys):
    load_tool('toy/make_data').main([str(tmp_path), '--train', '0', '--test', '0', '--pairs', '1'])
    pipeline = [{'type': 'LoadPair'}, {'type': 'PackPair'}]
    model = {
        'type': 'CorrespondenceModel',
        'backbone': {
            'type': 'DiffusionBackbone',
            'model': str(tiny_pipeline),
            'layers': [LAYER],
            'timesteps': [50, 900],
        },
        'neck': {'type': 'ConcatNeck', 'levels': [[32]], 'timesteps': 2},
    }
    data = {'type': 'ToyPairDataset', 'data_root': str(tmp_path / 'SPair-toy'), 'split': 'test', 'test_mode': True}
    config = {'model': model, 'test_dataloader': {'dataset': {**data, 'pipeline': pipeline}}}
    Config(config).dump(tmp_path / 'config.py')
    arguments = [str(tmp_path / 'config.py'), '--category', 'horse', 'dog']
    assert tool.main(arguments) == 0
    out = capsys.readouterr().out
    assert '| 50 | ' in out and 'all together: ' in out and '| neighbours | all others |' in out
    assert tool.main([*arguments, '--draws', '2']) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith('| draw')]
    assert len(rows) == 2 and 'all together' not in out
    assert tool.main([str(tmp_path / 'config.py'), '--category', 'cow']) == 2
    assert 'no test pair has a category' in capsys.readouterr().err

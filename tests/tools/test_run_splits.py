import json
import os
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from tiny_mmseg import segmentor_config

ROOT = Path(__file__).parents[2]
PICTURES = {'train': 3, 'test': 4}


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('run_splits')


@pytest.fixture
def configs(tiny_pipeline, tmp_path):
    """One config on toy pictures, and one on a data set whose split is fixed."""
    generator = np.random.default_rng(0)
    for split, count in PICTURES.items():
        folder = tmp_path / 'data/real' / split
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(generator.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / f'{split}{i}.png')
            np.save(folder / f'{split}{i}.npy', generator.integers(3, size=(32, 32), dtype=np.uint8))
    pipeline = [{'type': 'LoadImageFromFile'}, {'type': 'LoadLabelArray'}, {'type': 'PackSegInputs'}]
    scarce = {'type': 'ScarceDataset', 'category': 'toy', 'data_root': str(tmp_path / 'data'), 'pipeline': pipeline}
    fixed = {
        'type': 'BaseSegDataset',
        'data_root': str(tmp_path / 'data/real/train'),
        'img_suffix': '.png',
        'seg_map_suffix': '.npy',
        'metainfo': {'classes': list('abc'), 'palette': [[0, 0, 0]] * 3},
        'pipeline': pipeline,
    }
    paths = []
    for name, train, test in (
        ('scarce', {**scarce, 'split': 'real/train'}, {**scarce, 'split': 'real/test'}),
        ('fixed', fixed, fixed),
    ):
        cfg = Config.fromfile(ROOT / 'configs/_base_/default_runtime.py')
        model = segmentor_config(tiny_pipeline, {'timesteps': [50]})
        model['neck']['timesteps'] = 1
        model['decode_head']['num_classes'] = 8 if name == 'scarce' else 3
        cfg.merge_from_dict(
            {
                'model': model,
                'train_dataloader': {
                    'batch_size': 2,
                    'num_workers': 0,
                    'sampler': {'type': 'InfiniteSampler'},
                    'dataset': train,
                },
                'test_dataloader': {
                    'batch_size': 1,
                    'num_workers': 0,
                    'sampler': {'type': 'DefaultSampler', 'shuffle': False},
                    'dataset': test,
                },
                'test_evaluator': {'type': 'ScarceIoUMetric' if name == 'scarce' else 'IoUMetric'},
                'optim_wrapper': {'type': 'OptimWrapper', 'optimizer': {'type': 'AdamW', 'lr': 1e-3}},
                'train_cfg': {'type': 'IterBasedTrainLoop', 'max_iters': 2},
                'test_cfg': {'type': 'TestLoop'},
                'default_hooks': {'checkpoint': {'type': 'CheckpointHook', 'by_epoch': False, 'interval': 1}},
            }
        )
        paths.append(tmp_path / f'{name}.py')
        cfg.dump(paths[-1])
    return paths


def test_runs_are_kept_skipped_resumed_and_not_mixed(tool, configs, tmp_path, capsys, monkeypatch):
    work_dir = tmp_path / 'work'
    arguments = [*map(str, configs), '--seeds', '2', '--work-dir', str(work_dir)]
    tool.main(arguments)
    results = {path: json.loads(path.read_text()) for path in sorted(work_dir.glob('*/*.json'))}
    assert [str(path.relative_to(work_dir)) for path in results] == [
        f'{name}/seed{seed}.json' for name in ('fixed', 'scarce') for seed in (0, 1)
    ]
    for path, content in results.items():
        assert content['seed'] == int(path.stem[-1])
        assert content['resplit'] == (path.parent.name == 'scarce')
        assert content['config'] == str(tmp_path / f'{path.parent.name}.py')
        assert content['seconds'] > 0 and 'torch' in content['versions']
    scores = [results[work_dir / f'scarce/seed{seed}.json']['metrics']['scarce/mIoU'] for seed in (0, 1)]
    table = capsys.readouterr().out.strip().splitlines()[-4:]
    assert table[0] == '| config | seeds | aAcc | mIoU | mAcc | scarce/mIoU |'
    assert table[2].startswith('| `scarce` | 2 | ')
    assert table[2].endswith(f' | {np.mean(scores):.2f} ± {np.std(scores, ddof=1):.2f} |')
    assert table[3].startswith('| `fixed` | 2 | ') and table[3].endswith(' |  |')

    for seed in (0, 1):
        cfg = Config.fromfile(next((work_dir / f'scarce/seed{seed}').glob('*/vis_data/config.py')))
        assert cfg.randomness.seed == seed
        assert [cfg[f'{split}_dataloader'].dataset.resplit for split in PICTURES] == [seed, seed]

    # finished runs are skipped, one that has been stopped goes on from its checkpoint
    stopped = work_dir / 'scarce/seed1.json'
    stopped.unlink()
    os.remove(work_dir / 'scarce/seed1/iter_2.pth')
    (work_dir / 'scarce/seed1/last_checkpoint').write_text(str(work_dir / 'scarce/seed1/iter_1.pth'))
    first = (work_dir / 'scarce/seed1/iter_1.pth').stat().st_mtime_ns
    others = {path: path.stat().st_mtime_ns for path in results if path != stopped}
    tool.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert (work_dir / 'scarce/seed1/iter_1.pth').stat().st_mtime_ns == first
    assert json.loads(stopped.read_text())['metrics'] == results[stopped]['metrics']
    assert capsys.readouterr().out.strip().splitlines()[-4:] == table

    for changed in (['--cfg-options', 'train_cfg.max_iters=3'], ['--no-resplit']):
        with pytest.raises(SystemExit, match='another version of this config'):
            tool.main([*arguments, *changed])


def test_a_config_without_training_is_only_tested(tool, configs, tmp_path, capsys):
    cfg = Config.fromfile(configs[1])
    for key in ('train_cfg', 'train_dataloader', 'optim_wrapper'):
        cfg[key] = None
    cfg.dump(tmp_path / 'zero-shot.py')
    tool.main([str(tmp_path / 'zero-shot.py'), '--seeds', '1', '--work-dir', str(tmp_path / 'work')])
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith('| `zero-shot` | 1 | ')
    assert not list(tmp_path.glob('work/**/*.pth'))


def test_differences_are_those_of_the_same_seed(tool):
    rows = {'a': [{'x': 1.0, 'y': 5.0}, {'x': 3.0, 'y': 5.0}], 'b': [{'x': 2.0}, {'x': 5.0}]}
    assert tool.differences(rows, 'a') == {'b': [{'x': 1.0}, {'x': 2.0}]}
    assert tool.select(rows['a'][0], 'x*') == {'x': 1.0}


def test_two_configs_of_one_name(tool, configs, capsys):
    with pytest.raises(SystemExit):
        tool.main([str(configs[0]), f'elsewhere/{configs[0].name}'])
    assert 'scarce, scarce' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main([str(configs[0]), '--baseline', 'configs/another.py'])
    assert 'another.py is none of the configs' in capsys.readouterr().err


def test_summary(tool):
    assert tool.summary([1.0, 2.0, 4.5]) == '2.50 ± 1.80'
    assert tool.summary([1.0]) == '1.00'

"""Training, testing, interrupting and rescoring on toy pairs, through the tools; and the real pairs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS

from diffseg.evaluation.pck import score

ROOT = Path(__file__).parents[2]

CONFIG = """
_base_ = {base!r}

model = dict(
    type='CorrespondenceModel',
    backbone=dict(
        type='DiffusionBackbone', model={model!r}, layers=['up-level3-repeat0-vit-block0-self-k'], timesteps=[50]
    ),
    neck=dict(
        type='AggregationNeck', levels=[[32]], timesteps=1, out_channels=16, num_groups=4, output_sizes=[8]
    ),
    prompt='a photo of a {{category}}',
)
pipeline = [dict(type='LoadPair'), dict(type='ResizePair', size=64), dict(type='PackPair')]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='InfiniteSampler'),
    dataset=dict(type='ToyPairDataset', data_root={data!r}, split='trn', pipeline=pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='ToyPairDataset', data_root={data!r}, split='val', pipeline=pipeline, test_mode=True),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='ToyPairDataset', data_root={data!r}, split='test', pipeline=pipeline, test_mode=True),
)
val_evaluator = dict(type='PCKMetric')
test_evaluator = dict(type='PCKMetric', out_file={out_file!r})
custom_hooks = [*_base_.custom_hooks, dict(type='ResumableTestHook')]
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
param_scheduler = []
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2, save_best='PCK@0.1-bbox/point', rule='greater'),
)
"""


@HOOKS.register_module(force=True)
class KillHook(Hook):
    """Stop a test after some iterations."""

    def __init__(self, after: int) -> None:
        self.after = after

    def after_test_iter(self, runner: Runner, batch_idx: int, *args: object, **kwargs: object) -> None:
        if batch_idx + 1 == self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope='module')
def pairs(load_tool, tmp_path_factory) -> Path:
    """Toy pairs: one of each species and split."""
    folder = tmp_path_factory.mktemp('pairs')
    load_tool('toy/make_data').main([str(folder), '--train', '0', '--test', '0', '--pairs', '1'])
    return folder / 'SPair-toy'


@pytest.fixture
def config(pairs, tiny_pipeline, tmp_path) -> Path:
    path = tmp_path / 'pairs.py'
    base = str(ROOT / 'configs' / '_base_' / 'default_runtime.py')
    out_file = str(tmp_path / 'pck.json')
    path.write_text(CONFIG.format(base=base, model=str(tiny_pipeline), data=str(pairs), out_file=out_file))
    return path


@pytest.fixture
def run(load_tool, config, tmp_path) -> Callable[..., dict[str, float] | None]:
    """Call a tool on the config."""

    def run(tool: str, *arguments: str | Path) -> dict[str, float] | None:
        return load_tool(tool).main([str(config), *map(str, arguments), '--work-dir', str(tmp_path / 'work')])

    return run


def test_train_resume_test_and_rescore(run, load_tool, tmp_path, capsys):
    run('train')
    assert list((tmp_path / 'work').glob('best_PCK@0.1-bbox_point_iter_2.pth'))
    run('train', '--resume', '--cfg-options', 'train_cfg.max_iters=4')
    checkpoint = tmp_path / 'work' / 'iter_4.pth'
    assert checkpoint.stat().st_size < 5e5  # the diffusion model stays out of it
    figures = run('test', checkpoint)
    assert 0 < figures['PCK@0.1-bbox/point'] < 100 and figures['damaged'] == 0
    assert run('test', checkpoint) == figures
    assert not (tmp_path / 'work' / 'predictions').exists()

    result = json.loads((tmp_path / 'pck.json').read_text())
    assert result['protocol']['split'] == 'test' and result['protocol']['pairs'] == len(result['predictions']) == 4
    assert result['protocol']['prompt'] == 'a photo of a {category}'
    rescore = load_tool('analysis/rescore')
    capsys.readouterr()
    assert rescore.main([str(tmp_path / 'pck.json')]) == 0
    assert f'{figures["PCK@0.1-bbox/point"]:.2f} {figures["PCK@0.1-bbox/image"]:.2f}' in capsys.readouterr().out
    result['predictions'][0]['predicted'][0] = [-1000, -1000]
    result['predictions'][0]['target'][0] = [-1000, -1000]
    result['figures']['all']['PCK@0.15-img/point'] -= 1
    (tmp_path / 'pck.json').write_text(json.dumps(result))
    assert rescore.main([str(tmp_path / 'pck.json')]) == 1
    assert 'all PCK@0.15-img/point is' in capsys.readouterr().out
    (tmp_path / 'other.json').write_text('{"figures": {}}')
    assert rescore.main([str(tmp_path / 'other.json')]) == rescore.main([str(tmp_path / 'none.json')]) == 2
    assert "no ['predictions', 'protocol']" in (text := capsys.readouterr().err) and 'none.json cannot be read' in text


def zero_shot(config: Path, tmp_path: Path, **changes) -> Runner:
    """A runner without checkpoint that tests."""
    cfg = Config.fromfile(config)
    cfg.merge_from_dict({'work_dir': str(tmp_path / 'work'), **changes})
    cfg.default_scope = 'mmseg'
    return Runner.from_cfg(cfg)


def interrupt(config: Path, tmp_path: Path, folder: str | None = None) -> Path:
    """Kill a test after three of its four pairs; the file of their predictions."""
    hooks = [{'type': 'ResumableTestHook', 'folder': folder}, {'type': 'KillHook', 'after': 3, 'priority': 'LOWEST'}]
    with pytest.raises(KeyboardInterrupt):
        zero_shot(config, tmp_path, custom_hooks=hooks, experiment_name='a').test()
    return Path(folder or tmp_path / 'work' / 'predictions', 'test-predictions-0.jsonl')


def test_interrupted_and_resumed_gives_the_same_figures(config, tmp_path):
    undisturbed = zero_shot(config, tmp_path).test()
    expected = json.loads((tmp_path / 'pck.json').read_text())
    predictions = interrupt(config, tmp_path)
    assert len(predictions.read_text().splitlines()) == 1 + 3
    predictions.write_bytes(predictions.read_bytes()[:-5])  # killed while it wrote

    runner = zero_shot(config, tmp_path, experiment_name='c')
    encoded = []
    runner.model.backbone.register_forward_hook(lambda module, args, maps: encoded.append(len(args[0])))
    assert runner.test() == undisturbed
    assert sum(encoded) == 2 * 2  # images of the pairs that were not kept
    resumed = json.loads((tmp_path / 'pck.json').read_text())
    assert resumed == expected
    assert not predictions.parent.exists()


def test_confidences_survive_an_interruption(config, tmp_path):
    text = config.read_text().replace("prompt='a", "cycle_error=True,\n    prompt='a")
    config.write_text(text.replace("'PCKMetric', out_file", "'PCKMetric', confidence='cycle_error', out_file"))
    undisturbed = zero_shot(config, tmp_path).test()
    assert 0 < undisturbed['PCK@0.1-bbox/coverage-area'] < 100
    interrupt(config, tmp_path)
    assert zero_shot(config, tmp_path, experiment_name='c').test() == undisturbed


def test_an_interrupted_test_of_other_settings_is_not_resumed(config, tmp_path):
    predictions = interrupt(config, tmp_path)
    content = predictions.read_bytes()
    pipeline = [{'type': 'LoadPair'}, {'type': 'ResizePair', 'size': 128}, {'type': 'PackPair'}]
    changes = {
        'match_size': {'model.match_size': 64},
        'test_dataset config': {'test_dataloader.dataset.pipeline': pipeline},
        'test_evaluator config': {'test_evaluator.categories': ['horse']},
        'data_preprocessor config': {'model.data_preprocessor': {'type': 'PairDataPreProcessor', 'non_blocking': True}},
    }
    for name, change in changes.items():
        message = rf'test-predictions-0\.jsonl holds predictions of another test, which differs in {name};'
        with pytest.raises(ValueError, match=message):
            zero_shot(config, tmp_path, experiment_name=name, **change).test()
    assert predictions.read_bytes() == content
    zero_shot(config, tmp_path, experiment_name='batches', **{'test_dataloader.batch_size': 4}).test()


def test_files_of_others_stay_where_predictions_are_kept(config, tmp_path):
    folder = tmp_path / 'shared'
    folder.mkdir()
    for name in ('notes.txt', 'results.jsonl'):
        (folder / name).write_text('no predictions')
    predictions = interrupt(config, tmp_path, str(folder))
    hooks = [{'type': 'ResumableTestHook', 'folder': str(folder)}]
    zero_shot(config, tmp_path, custom_hooks=hooks, experiment_name='b').test()
    assert not predictions.exists()
    assert [path.read_text() for path in folder.iterdir()] == ['no predictions'] * 2

    predictions.write_text('{"pairs": 4}\n{"pair_id": 3\n')
    with pytest.raises(ValueError, match=r'test-predictions-0\.jsonl is damaged'):
        zero_shot(config, tmp_path, custom_hooks=hooks, experiment_name='c').test()


def test_selection_on_the_test_split_is_refused_unless_allowed(run):
    split = 'val_dataloader.dataset.split=test'
    with pytest.raises(ValueError, match='CheckpointHook would select by figures on the test split'):
        run('train', '--cfg-options', split)
    run('train', '--cfg-options', split, 'val_evaluator.allow_selection_on_test=True', 'train_cfg.max_iters=1')


def test_damaged_images_are_counted(config, pairs, tmp_path):
    annotation = sorted((pairs / 'PairAnnotation' / 'test').glob('*.json'))[0]
    pair = json.loads(annotation.read_text())
    image = pairs / 'JPEGImages' / pair['category'] / pair['src_imname']
    content = image.read_bytes()
    image.write_bytes(content[:100])
    try:
        figures = zero_shot(config, tmp_path, experiment_name='e').test()
        with pytest.raises(ValueError, match=image.name):
            zero_shot(config, tmp_path, experiment_name='f', **{'test_dataloader.dataset.strict': True}).test()
    finally:
        image.write_bytes(content)
    assert figures['damaged'] == 1
    result = json.loads((tmp_path / 'pck.json').read_text())
    assert result['protocol']['damaged'] == 1 and image.name in result['damaged'][0]


def test_real_pairs_and_their_sources_twice(reference, config, tmp_path):
    """The six real pairs run; with the source as target, figures are 100, but for points at borders and near misses."""
    data = reference('spair-scores').parents[1] / 'SPair-71k-mini'
    dataset = {'type': 'SPairDataset', 'data_root': str(data)}
    changes = {f'test_dataloader.dataset.{key}': value for key, value in dataset.items()}
    figures = zero_shot(config, tmp_path, experiment_name='g', **changes).test()
    assert 0 <= figures['PCK@0.1-img/point'] < 100
    runner = zero_shot(config, tmp_path, experiment_name='h', **changes)
    runner.test_dataloader.dataset.pipeline.transforms.insert(0, same_image_twice)
    figures = runner.test()
    assert figures.pop('damaged') == 0
    assert {value for name, value in figures.items() if '@0.1-' in name} == {100}
    assert min(figures.values()) > 95  # within half a cell of a border all pixels are equal, and the first is matched
    assert score(json.loads((tmp_path / 'pck.json').read_text())['predictions'])['all'] == figures


def same_image_twice(results: dict) -> dict:
    return results | {f'{key}1': results[f'{key}0'] for key in ('img_path', 'keypoints', 'bbox', 'ori_shape')}

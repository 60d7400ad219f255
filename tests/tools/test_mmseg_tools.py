"""Every config of a segmentor works with mmseg's inference functions and with all options of the tools for testing."""

import os
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
import tiny_vision
import torch
from layouts import write_ade20k
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import BaseTTAModel
from mmengine.registry import init_default_scope
from mmseg.apis import MMSegInferencer, inference_model, init_model
from mmseg.apis.utils import _preprare_data
from mmseg.engine import SegVisualizationHook
from mmseg.evaluation import IoUMetric
from mmseg.registry import DATASETS, HOOKS, METRICS, MODELS, VISUALIZERS
from mmseg.visualization import SegLocalVisualizer
from PIL import Image
from shrink import shrink, shrink_backbone

from diffseg.datasets.categories import CATEGORIES

ROOT = Path(__file__).parents[2]


@cache
def read(path: Path) -> Config:
    return Config.fromfile(path, import_custom_modules=False)


PATTERNS = ('ablations/[!_]*.py', 'scarce/*.py', 'search/*-upernet.py', 'segmentation/*.py')
CONFIGS = [path for pattern in PATTERNS for path in sorted((ROOT / 'configs').glob(pattern))]


def test_all_configs_are_seen():
    seen = [len([*(ROOT / 'configs').glob(pattern)]) for pattern in PATTERNS]
    assert all(number >= expected for number, expected in zip(seen, (12, 27, 1, 40), strict=True))
    assert {read(path).model.type for path in CONFIGS} == {'EncoderDecoder'}


@pytest.fixture(scope='module')
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('picture') / 'new.png'
    Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 56, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_a_config_has_what_the_tools_of_mmseg_use(path, picture):
    cfg = deepcopy(read(path))
    init_default_scope('mmseg')

    scale = next((step.scale for step in cfg.test_pipeline if step.type == 'Resize'), (56, 40))
    for image in (str(picture), mmcv.imread(picture)):
        data, _ = _preprare_data(image, SimpleNamespace(cfg=deepcopy(cfg)))  # of inference_model
        sample = data['data_samples'][0]
        assert sample.ori_shape == (40, 56) and 'gt_sem_seg' not in sample
        assert {data['inputs'][0].shape[1], data['inputs'][0].shape[2]} & set(scale)
    pipeline = MMSegInferencer._init_pipeline(object.__new__(MMSegInferencer), deepcopy(cfg))
    assert pipeline(str(picture))['inputs'].equal(data['inputs'][0])

    assert issubclass(HOOKS.get(cfg.default_hooks.visualization.type), SegVisualizationHook)
    assert issubclass(VISUALIZERS.get(cfg.visualizer.type), SegLocalVisualizer)  # MMSegInferencer asks for it
    assert issubclass(METRICS.get(cfg.test_evaluator['type']), IoUMetric)  # mmseg's test.py sets its output_dir

    assert issubclass(MODELS.get(cfg.tta_model.type), BaseTTAModel)
    loads = [step for step in cfg.test_pipeline if step.type in ('LoadAnnotations', 'LoadLabelArray')]
    augmented = [step for group in cfg.tta_pipeline[-1].transforms for step in group]
    assert cfg.tta_pipeline[-1].type == 'TestTimeAug' and Compose(deepcopy(cfg).tta_pipeline)
    assert [step.type for step in loads] == [s.type for s in augmented if s.type.startswith('Load')]
    assert [step for step in loads if step.type == 'LoadLabelArray'] == [
        step for step in augmented if step.type == 'LoadLabelArray'
    ]  # of the same size


def test_faces_have_a_left_and_a_right_side():
    classes = CATEGORIES['celeba_19']['classes']
    sided = {(classes.index(f'l_{part}'), classes.index(f'r_{part}')) for part in ('brow', 'ear', 'eye')}
    for path in CONFIGS:
        cfg = read(path)
        if cfg.tta_model.type == 'VoteTTAModel':
            pairs = {tuple(pair) for pair in cfg.tta_model.get('swapped_by_flip', [])}
            assert pairs == (sided if cfg.test_dataloader.dataset.category == 'celeba_19' else set())


class Run:
    """A config at the size of a test, with a checkpoint."""

    def __init__(self, cfg: Config, folder: Path) -> None:
        cfg.work_dir = str(folder)
        self.config, self.checkpoint = folder / 'config.py', str(folder / 'checkpoint.pth')
        cfg.dump(self.config)
        dataset, model = DATASETS.build(cfg.test_dataloader.dataset), MODELS.build(cfg.model)
        torch.save({'meta': {'dataset_meta': dataset.metainfo}, 'state_dict': model.state_dict()}, self.checkpoint)


@pytest.fixture(scope='module')
def scarce_data(tmp_path_factory) -> Path:
    """Pictures of several sizes, none of them that of the labels, and their labels."""
    root, generator = tmp_path_factory.mktemp('scarce'), np.random.default_rng(0)
    for i, split in enumerate(('real/train', 'real/test', 'real/test', 'generated/kept')):
        folder = root / split
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(256, size=(40 + 8 * i, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{i}.png')
        np.save(folder / f'{i}.npy', generator.integers(5, size=pixels.shape[:2]))
    return root


@pytest.fixture(scope='module', params=['pixel classifiers', 'maps of any size', 'ResNet', 'ADE20K', 'ensemble'])
def run(request, tiny_pipeline, scarce_data, tmp_path_factory) -> Run:
    init_default_scope('mmseg')
    folder = tmp_path_factory.mktemp('run')
    if request.param in ('ADE20K', 'ensemble'):
        model = {'ADE20K': 'sd15', 'ensemble': 'sd15+dinov2-b'}[request.param]
        path = ROOT / f'configs/segmentation/{model}-t50_agg-upernet_1xb2-80k_ade20k-512x512.py'
        models = {'sd15': tiny_pipeline, 'dinov2-b': tiny_vision.save(tmp_path_factory.mktemp('vision') / 'dinov2')}
        cfg = shrink(path, models, write_ade20k(tmp_path_factory.mktemp('ade'), val=2), folder, 1)
        cfg.default_hooks.visualization.interval = 1  # not 50
        cfg.tta_pipeline[-1].transforms[0] = cfg.tta_pipeline[-1].transforms[0][:2]
        return Run(cfg, folder)
    stem = {
        'pixel classifiers': 'sd15-t51_pixel-classifier_1xb64-100e_horse-21-512x512',
        'maps of any size': 'tiny-sd-t50+150+300_agg-fcn_1xb8-300_toy-64x64',
        'ResNet': 'deeplabv3-r101_1xb8-20e_dataset-ddpm-horse-21-256x256',
    }[request.param]
    cfg = Config(Config.fromfile(ROOT / f'configs/scarce/{stem}.py').to_dict(), format_python_code=False)
    for split in ('train', 'val', 'test'):
        if loader := cfg.get(f'{split}_dataloader'):
            loader.update(batch_size=1, num_workers=0, persistent_workers=False)
            loader.dataset.data_root = str(scarce_data)
    if request.param == 'pixel classifiers':
        cfg.model.decode_head.update(in_channels=shrink_backbone(cfg.model.backbone, {'sd15': tiny_pipeline}))
        cfg.model.decode_head.update(output_size=32, num_members=3, hidden=(8, 6))
        cfg.model.backbone.dtype = 'float32'
    if request.param == 'ResNet':
        cfg.model.backbone.update(depth=18, base_channels=4)
        cfg.model.decode_head.update(in_channels=32, channels=8, dilations=(1, 2))
    if stem.endswith(('512', '256')):
        flips = cfg.tta_pipeline[-1].transforms
        for step in (*cfg.test_dataloader.dataset.pipeline, *cfg.test_pipeline, *flips[0], *flips[2]):
            if step.type in ('Resize', 'LoadLabelArray'):
                step['scale' if step.type == 'Resize' else 'size'] = (64, 64) if step.type == 'Resize' else 32
    return Run(cfg, folder)


def test_inference_labels_a_new_picture(run, picture, tmp_path):
    model = init_model(str(run.config), run.checkpoint, device='cpu')
    labels = inference_model(model, str(picture)).pred_sem_seg.data
    assert labels.shape == (1, 40, 56)
    assert labels.equal(inference_model(model, mmcv.imread(picture)).pred_sem_seg.data)

    inferencer = MMSegInferencer(str(run.config), run.checkpoint, device='cpu')
    result = inferencer(str(picture), return_vis=True, out_dir=str(tmp_path))
    np.testing.assert_array_equal(result['predictions'], labels[0])
    assert result['visualization'].shape == (40, 56, 3)
    np.testing.assert_array_equal(Image.open(next((tmp_path / 'pred').iterdir())), labels[0])


@pytest.mark.parametrize('tta', [False, True], ids=['once', 'augmented'])
def test_predictions_are_drawn_saved_and_augmented(run, load_tool, tmp_path, tta):
    arguments = [str(run.config), run.checkpoint, '--work-dir', str(tmp_path), '--show-dir', str(tmp_path / 'drawn')]
    metrics = load_tool('test').main([*arguments, '--out', str(tmp_path / 'out'), *['--tta'] * tta])
    assert 0 <= metrics['mIoU'] <= 100
    saved = [np.asarray(Image.open(path)) for path in sorted((tmp_path / 'out').iterdir())]
    drawn = [mmcv.imread(path) for path in sorted((tmp_path / 'drawn').rglob('*.png'))]
    assert len(saved) == len(drawn) == 2
    for labels, picture in zip(saved, drawn, strict=True):
        height, width = labels.shape
        assert picture.shape == (height, 2 * width, 3)  # truth beside prediction


@pytest.mark.parametrize(
    'option, change, message',
    [
        ('--show-dir=drawn', {'default_hooks': {}}, 'SegVisualizationHook'),
        (
            '--out=labels',
            {'test_evaluator': [{'type': 'DAVISMetric'}]},
            'needs an IoUMetric in test_evaluator, which has',
        ),
        ('--tta', {'tta_model': {}}, '--tta needs tta_pipeline in the config'),
    ],
)
def test_what_a_config_lacks_is_said(load_tool, tmp_path, capsys, option, change, message):
    Config(change).dump(tmp_path / 'config.py')
    with pytest.raises(SystemExit):
        load_tool('test').main([str(tmp_path / 'config.py'), option])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_options_reach_the_runner(load_tool, tmp_path, monkeypatch, tool):
    """Those that need an accelerator, several processes or a display."""
    monkeypatch.setenv('LOCAL_RANK', '')
    monkeypatch.delenv('LOCAL_RANK')
    module, built = load_tool(tool), []
    monkeypatch.setattr(module.Runner, 'from_cfg', built.append)
    optimizer = {'type': 'OptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 1.0}}
    hooks = {'visualization': {'type': 'SegVisualizationHook'}}
    Config({'optim_wrapper': optimizer, 'default_hooks': hooks}).dump(tmp_path / 'config.py')
    options = {'train': ['--amp'], 'test': ['--show', '--wait-time', '0.5']}[tool]
    with pytest.raises(AttributeError):  # what was built is no runner
        module.main([str(tmp_path / 'config.py'), *options, '--launcher', 'pytorch', '--local_rank', '3'])
    (cfg,) = built
    assert (cfg.launcher, os.environ['LOCAL_RANK'], cfg.work_dir) == ('pytorch', '3', 'work_dirs/config')
    if tool == 'train':
        wrapper = cfg.optim_wrapper
        assert (wrapper.type, wrapper.loss_scale) == ('AmpOptimWrapper', 'dynamic')
    else:
        assert cfg.default_hooks.visualization == {
            **hooks['visualization'],
            'draw': True,
            'show': True,
            'wait_time': 0.5,
        }

"""Every config of a segmentor works with mmseg's inference functions and with all options of the tools for testing."""

import warnings
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
import torch
from layouts import write_ade20k
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import BaseTTAModel
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.apis import MMSegInferencer, inference_model, init_model
from mmseg.apis.utils import _preprare_data
from mmseg.engine import SegVisualizationHook
from mmseg.evaluation import IoUMetric
from mmseg.registry import HOOKS, METRICS, MODELS, VISUALIZERS
from mmseg.visualization import SegLocalVisualizer
from PIL import Image
from shrink import shrink, shrink_backbone

import diffseg  # noqa: F401

ROOT = Path(__file__).parents[2]


@cache
def read(path: Path) -> Config:
    return Config.fromfile(path, import_custom_modules=False)


PATTERNS = ('ablations/[!_]*.py', 'scarce/*.py', 'search/*-upernet.py', 'segmentation/*.py')
CONFIGS = [path for pattern in PATTERNS for path in sorted((ROOT / 'configs').glob(pattern))]


def test_all_configs_are_seen():
    assert {pattern: len([*(ROOT / 'configs').glob(pattern)]) for pattern in PATTERNS} == dict(
        zip(PATTERNS, (12, 21, 1, 40), strict=True)
    )
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

    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'The draw is False')
        assert isinstance(HOOKS.build(cfg.default_hooks.visualization), SegVisualizationHook)
    assert issubclass(VISUALIZERS.get(cfg.visualizer.type), SegLocalVisualizer)  # MMSegInferencer asks for it
    assert issubclass(METRICS.get(cfg.test_evaluator['type']), IoUMetric)  # mmseg's test.py sets its output_dir

    assert issubclass(MODELS.get(cfg.tta_model.type), BaseTTAModel)
    loads = [step for step in cfg.test_pipeline if step.type in ('LoadAnnotations', 'LoadLabelArray')]
    augmented = [step for group in cfg.tta_pipeline[-1].transforms for step in group]
    assert cfg.tta_pipeline[-1].type == 'TestTimeAug' and Compose(deepcopy(cfg).tta_pipeline)
    assert [step.type for step in loads] == [s.type for s in augmented if s.type.startswith('Load')]
    assert [step for step in loads if step.type == 'LoadLabelArray'] == [
        step for step in augmented if step.type == 'LoadLabelArray'  # of the same size
    ]

"""The comparison of necks on toy pairs: each config is what its name says, and no held-out keypoint is trained on."""

import runpy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS
from parts import described

import diffseg  # noqa: F401
from diffseg.datasets.toy import KEYPOINTS

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(ROOT.glob('configs/correspondence/toy-necks/[!_]*.py'))
NECKS = {
    'agg': 'AggregationNeck',
    'mean': 'AggregationNeck',
    'enlarged': 'AggregationNeck',
    'fast': 'AggregationNeck',
    'gated': 'GatedAggregationNeck',
    'ordered': 'OrderedAggregationNeck',
    'upsampling': 'UpsamplingNeck',
    'concat': 'ConcatNeck',
    'zero-shot': 'ConcatNeck',
}
STEPS = {'clean': 1, 'inversion166': 1, 'inversion3': 3, 'inversion11': 11}


def test_all_configs_are_seen():
    assert len(CONFIGS) == 19


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_what_its_name_says(path):
    cfg = Config.fromfile(path, import_custom_modules=False)
    _, steps, kind = path.stem.split('_')
    assert cfg.model.neck.type == NECKS[kind]
    assert len(cfg.model.backbone.timesteps) == STEPS[steps]
    rates = cfg.optim_wrapper and cfg.optim_wrapper.get('paramwise_cfg', {}).get('custom_keys', {})
    expected = {'zero-shot': None} | {
        name: {'mixing_weights': {'lr_mult': rate}} for name, rate in (('mean', 0), ('fast', 30))
    }
    assert rates == expected.get(kind, {})
    init_default_scope('mmseg')
    maps = list(described(cfg.model.backbone, 64, 64))
    side = max(x.shape[-1] for x in maps) * (2 if kind in ('enlarged', 'upsampling') else 1)
    assert cfg.model.backbone.get('output_image', False) == (kind == 'upsampling')
    if kind == 'upsampling':
        maps.append(torch.empty(2, 3, 64, 64, device='meta'))
    with torch.device('meta'):
        neck = MODELS.build(cfg.model.neck)
        head = MODELS.build(cfg.model.get('head', {'type': 'DescriptorHead'}))
    (descriptors,) = neck(maps)
    assert head(descriptors).shape == (2, 912 if kind == 'zero-shot' else 64, side, side)


def test_held_out_keypoints_are_scored_and_not_trained_on(tmp_path):
    arguments = [str(tmp_path), '--train', '0', '--test', '0', '--pairs', '1']
    runpy.run_path(str(ROOT / 'tools/toy/make_data.py'))['main'](arguments)
    cfg = Config.fromfile(CONFIGS[0], import_custom_modules=False)
    assert sorted(cfg.seen + cfg.unseen) == list(range(len(KEYPOINTS)))
    evaluated = {evaluator.prefix: evaluator.keypoint_ids for evaluator in cfg.test_evaluator}
    assert evaluated == {f'{where}{kind}': cfg[kind] for where in ('', 'across-') for kind in ('seen', 'unseen')}
    init_default_scope('mmseg')
    dataset = DATASETS.build({**cfg.train_dataloader.dataset, 'data_root': str(tmp_path / 'SPair-toy')})
    for item in dataset:
        sample = item['data_samples']
        assert set(sample.keypoint_ids[sample.visible].tolist()) <= set(cfg.seen) and sample.visible.any()

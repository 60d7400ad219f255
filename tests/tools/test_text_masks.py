"""Configs of masks from text, tested without a checkpoint by tools/test.py, with tiny networks."""

import json
from pathlib import Path

import numpy as np
import pytest
from layouts import write_ade20k
from mmengine.config import Config
from mmseg.apis import inference_model, init_model, show_result_pyplot
from mmseg.registry import DATASETS

from diffseg.diffusion.loading import meta_network

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / 'configs/text-masks').rglob('*.py'))


@pytest.fixture(scope='module')
def data(load_tool, tmp_path_factory):
    """Folders of both data sets."""
    folder = tmp_path_factory.mktemp('data')
    load_tool('toy/make_data').main([str(folder), '--train', '0', '--test', '2'])
    return {'toy': folder / 'toy', 'ade': write_ade20k(folder, train=0)}


def shrunk(path, folder, data_root, work_dir):
    """A shipped config with a tiny network and data."""
    cfg = Config(Config.fromfile(path).to_dict(), format_python_code=False)
    cfg.model.update(model=str(folder), blocks=[0, 1], input_size=64, dtype='float32', max_sequence_length=20)
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.test_dataloader.dataset.data_root = str(data_root)
    cfg.dump(work_dir / 'config.py')
    return str(work_dir / 'config.py')


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_tested_without_a_checkpoint(path, pipeline_folder, load_tool, data, tmp_path):
    root = data['toy' if path.parent.name == 'toy' else 'ade']
    config = shrunk(path, pipeline_folder('flux' if 'flux' in path.stem else 'sd3'), root, tmp_path)
    options = ['--work-dir', str(tmp_path / 'work'), *['--tta'] * ('cross' in path.stem)]
    figures = load_tool('test').main([config, *options])
    assert 0 <= figures['mIoU'] <= 100
    result = json.loads((tmp_path / 'work/text_masks.json').read_text())
    dataset = DATASETS.build(Config.fromfile(config).test_dataloader.dataset)
    protocol = result['protocol']
    assert protocol['classes'] == [*dataset.metainfo['classes']] == [*result['iou']]
    assert protocol['images'] == len(dataset) and protocol['prompt'] == '' and 'all classes' in protocol['text']
    assert ('cross-attention' in path.stem) == (protocol['method'] == 'cross-attention')
    assert result['figures']['mIoU'] == pytest.approx(figures['mIoU'])
    assert np.mean([x for x in result['iou'].values() if x is not None]) == pytest.approx(figures['mIoU'], abs=0.02)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_what_its_name_says(path):
    cfg = Config.fromfile(path)
    assert path.stem.startswith(f'{cfg.model.model}-t{1000 * cfg.model.timesteps[0]:.0f}_')
    number = meta_network(cfg.model.model).config.num_layers
    assert all(block in range(number) for block in cfg.model.blocks)
    assert cfg.model.space == 'attention' if 'cross-attention' in path.stem else 'space' not in cfg.model


def test_any_picture_is_labelled_with_any_names(pipeline_folder, tmp_path):
    config = shrunk(CONFIGS[0], pipeline_folder('flux'), tmp_path, tmp_path)
    model = init_model(config, device='cpu', cfg_options={'model.classes': ['horse', 'grass', 'sky']})
    picture = np.random.default_rng(0).integers(256, size=(40, 56, 3), dtype=np.uint8)
    result = inference_model(model, picture)
    labels = result.pred_sem_seg.data
    assert labels.shape == (1, 40, 56) and labels.max() < 3
    drawn = show_result_pyplot(model, picture, result, show=False, with_labels=False)
    colors = np.unique(np.round((drawn.astype(int) - 0.5 * picture) * 2).reshape(-1, 3).clip(0, 255), axis=0)
    wanted = {tuple(model.dataset_meta['palette'][label]) for label in labels.unique()}
    assert len(model.dataset_meta['palette']) == 3
    assert all(np.abs(colors - color).max(1).min() < 4 for color in wanted)

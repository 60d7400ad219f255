"""The shipped data set configs read the real folder layouts, unmodified but for `data_root`."""

from pathlib import Path

import numpy as np
import pytest
from layouts import toy_picture, write_ade20k, write_cityscapes
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS

import diffseg  # noqa: F401

CONFIGS = Path(__file__).parents[2] / 'configs'
LAYOUTS = {'ade20k': write_ade20k, 'cityscapes_1024x1024': write_cityscapes}
LAYOUTS['cityscapes_1024x1024_published'] = write_cityscapes


@pytest.fixture(scope='module', params=LAYOUTS)
def loaders(request, tmp_path_factory) -> tuple[Config, str]:
    init_default_scope('mmseg')
    cfg = Config.fromfile(CONFIGS / f'_base_/datasets/{request.param}.py')
    root = LAYOUTS[request.param](tmp_path_factory.mktemp(request.param), train=4, val=2)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(root)
    return cfg, request.param


def labels_of(sample: dict) -> np.ndarray:
    return sample['data_samples'].gt_sem_seg.data[0].numpy()


def test_validation_labels_are_the_files_in_their_own_size(loaders):
    cfg, name = loaders
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        dataset = DATASETS.build(loader.dataset)
        assert len(dataset) == 2
        for i, sample in enumerate(dataset):
            short_side = 512 if name == 'ade20k' else 1024
            assert min(sample['inputs'].shape[1:]) == short_side
            labels = labels_of(sample)
            _, parts = toy_picture(i, *labels.shape)
            last = len(dataset.metainfo['classes']) - 1  # 149 in ADE20K, 18 in Cityscapes
            assert labels[-1, -1] == last
            expected = np.where(parts == 0, 255, parts - 1)
            assert (labels != expected).sum() <= 1 and {255, 0} <= set(np.unique(labels))


def test_training_labels_are_classes_or_ignored(loaders):
    cfg, _ = loaders
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(dataset) == 4
    classes = len(dataset.metainfo['classes'])
    for sample in dataset:
        values = set(np.unique(labels_of(sample)))
        assert values <= {*range(7), classes - 1, 255} and values & set(range(7))
        assert sample['inputs'].shape[1:] == labels_of(sample).shape
        assert all(side <= crop for side, crop in zip(labels_of(sample).shape, cfg.crop_size, strict=True))


@pytest.mark.parametrize(('published', 'padding'), [(False, 255), (True, 1)])
def test_what_padded_pixels_are_labelled(published, padding, tmp_path):
    name = 'sd15-t51_concat-upernet-published' if published else 'sd15-t50_agg-upernet'
    cfg = Config.fromfile(CONFIGS / f'segmentation/{name}_1xb2-80k_ade20k-512x512.py')
    cfg.train_dataloader.dataset.data_root = str(write_ade20k(tmp_path, height=32, width=320))
    init_default_scope('mmseg')
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    sample = dataset[0]
    height = sample['inputs'].shape[1]
    assert height < 512  # a wide picture: its long side is at most 2048 * 2 pixels
    batch = MODELS.build(cfg.model.data_preprocessor)(pseudo_collate([sample]), training=True)
    assert batch['inputs'].shape == (1, 3, 512, 512)
    labels = labels_of({'data_samples': batch['data_samples'][0]})
    assert (labels[height:] == padding).all()

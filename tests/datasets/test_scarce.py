import numpy as np
import pytest
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS
from PIL import Image

import diffseg  # noqa: F401


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / 'real/train'
    path.mkdir(parents=True)
    for name in ('b', 'a'):
        Image.new('RGB', (6, 4), 'red').save(path / f'{name}.png')
        np.save(path / f'{name}.npy', np.full((4, 6), ord(name) - ord('a'), dtype=np.int64))
    return tmp_path


def build(folder, category='toy', split='real/train'):
    init_default_scope('mmseg')
    pipeline = [{'type': 'LoadImageFromFile'}, {'type': 'LoadLabelArray'}, {'type': 'PackSegInputs'}]
    return DATASETS.build(
        {'type': 'ScarceDataset', 'category': category, 'data_root': str(folder), 'split': split, 'pipeline': pipeline}
    )


def test_pictures_and_labels_in_order(folder):
    dataset = build(folder, 'horse_21')
    assert len(dataset) == 2
    assert len(dataset.metainfo['classes']) == len(dataset.metainfo['palette']) == 21
    for index in range(2):
        item = dataset[index]
        assert item['inputs'].shape == (3, 4, 6)
        assert (item['data_samples'].gt_sem_seg.data == index).all()


def test_bad_input(folder):
    with pytest.raises(ValueError, match=r'unicorn.*horse_21, toy'):
        build(folder, 'unicorn')
    with pytest.raises(ValueError, match=r'no \.png pictures'):
        build(folder, split='real/test')
    np.save(folder / 'real/train/a.npy', np.zeros((4, 6)))
    with pytest.raises(ValueError, match='float64'):
        build(folder)[0]
    (folder / 'real/train/b.npy').unlink()
    with pytest.raises(ValueError, match=r'1 pictures.*b\.npy'):
        build(folder)

"""Proposal Flow's two layouts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS
from PIL import Image
from scipy.io import savemat

import diffseg  # noqa: F401

CONFIGS = Path(__file__).resolve().parents[2] / 'configs/_base_/datasets'


def build(name, loader, folder, **kwargs):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')[f'{loader}_dataloader'].dataset
    init_default_scope('mmseg')
    return DATASETS.build({**cfg, 'data_root': str(folder), **kwargs})


@pytest.fixture
def willow(tmp_path):
    heading = ['imageA', 'imageB', *(f'{axis}{side}{i}' for side in 'AB' for axis in 'XY' for i in range(1, 11))]
    rows = [','.join(heading)]
    for category in ('duck(S)', 'car(G)'):
        (tmp_path / category).mkdir()
        for name in 'ab':
            Image.new('RGB', (30, 20), 'red').save(tmp_path / category / f'{name}.png')
        xa, ya = range(1, 11), range(2, 12)
        xb, yb = range(10, 30, 2), range(19, 9, -1)
        paths = [f'PF-dataset/{category}/{name}.png' for name in 'ab']
        rows.append(','.join(map(str, [*paths, *xa, *ya, *xb, *yb])))
    (tmp_path / 'test_pairs.csv').write_text('\n'.join(rows) + '\n')
    return tmp_path


def test_willow(willow):
    dataset = build('pf_willow', 'test', willow)
    assert len(dataset) == 2 and dataset.metainfo['box'] == 'keypoints'
    sample = dataset[0]['data_samples']
    assert sample.category == 'car(G)' and sample.img_path1 == str(willow / 'car(G)/b.png')
    assert sample.ori_shape0 == (20, 30) and sample.img_shape0 == (512, 512)
    assert sample.keypoints0.tolist() == [[1 + i, 2 + i] for i in range(10)]
    assert sample.keypoints1.tolist() == [[10 + 2 * i, 19 - i] for i in range(10)]
    assert sample.bbox1.tolist() == [10, 10, 28, 19]  # the extent of the keypoints: 18 x 9
    assert sample.visible.all()


def test_willow_damaged_row(willow):
    table = willow / 'test_pairs.csv'
    lines = table.read_text().splitlines()
    table.write_text('\n'.join([*lines, lines[-1].rsplit(',', 1)[0] + ',x', '', lines[-1].rsplit(',', 3)[0]]))
    dataset = build('pf_willow', 'test', willow)
    assert len(dataset) == 4
    assert [message.split(': ')[0] for message in dataset.damaged] == [f'{table}, line 4', f'{table}, line 6']
    table.write_text('imageA,imageB\n')
    with pytest.raises(ValueError, match=r'test_pairs\.csv: expected rows of at least 42 columns'):
        build('pf_willow', 'test', willow)
    table.unlink()
    with pytest.raises(ValueError, match=r'test_pairs\.csv is missing; .*found car\(G\), duck\(S\)\. Get'):
        build('pf_willow', 'test', willow)
    with pytest.raises(ValueError, match="has only 'test'"):
        build('pf_willow', 'test', willow, split='val')


@pytest.fixture
def pascal(tmp_path):
    (tmp_path / 'JPEGImages').mkdir()
    (tmp_path / 'Annotations/cow').mkdir(parents=True)
    for name, kps in {
        'a': [[1, 2], [3, 4], [np.nan, np.nan], [5, 6]],
        'b': [[7, 8], [np.nan, np.nan], [9, 10], [11.5, 12]],
    }.items():
        Image.new('RGB', (30, 20), 'red').save(tmp_path / f'JPEGImages/{name}.jpg')
        savemat(tmp_path / f'Annotations/cow/{name}.mat', {'kps': np.array(kps), 'bbox': np.array([[1, 2, 25, 18]])})
    paths = ','.join(f'PF-dataset-PASCAL/JPEGImages/{name}.jpg' for name in 'ab')
    (tmp_path / 'train_pairs_pf_pascal.csv').write_text(f'a,b,class,flip\n{paths},10,0\n{paths},10,1\n')
    for name in ('val_pairs.csv', 'test_pairs_pf_pascal.csv'):
        (tmp_path / name).write_text(f'source_image,target_image,class,XA,YA,XB,YB\n{paths},10,1;2,3;4,5;6,7;8\n')
    return tmp_path


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_pascal(pascal, split):
    dataset = build('pf_pascal', split, pascal, strict=True)
    assert len(dataset) == 1  # without the mirrored row
    sample = dataset[0]['data_samples']
    assert sample.category == 'cow' and sample.img_path0 == str(pascal / 'JPEGImages/a.jpg')
    assert sample.visible.tolist() == [True, False, False, True]
    assert sample.keypoints0[sample.visible].tolist() == [[1, 2], [5, 6]]
    assert sample.keypoints1[sample.visible].tolist() == [[7, 8], [11.5, 12]]
    assert torch.isfinite(sample.keypoints0).all()
    assert sample.bbox1.tolist() == [1, 2, 25, 18]


def test_pascal_damaged(pascal):
    path = pascal / 'Annotations/cow/b.mat'
    content = path.read_bytes()
    table = pascal / 'test_pairs_pf_pascal.csv'
    paths = 'x/a.jpg,x/a.jpg'
    table.write_text(f'{table.read_text()}{paths},21\n{paths},10\n')
    path.write_bytes(content[:150])
    dataset = build('pf_pascal', 'test', pascal)
    assert len(dataset) == 3 and sum('damaged' in dataset[i]['data_samples'] for i in range(3)) == 2
    assert f'{path} cannot be read' in dataset.damaged[0]
    assert f'{table}, line 3' in dataset.damaged[1]
    (pascal / 'JPEGImages').rename(pascal / 'images')
    with pytest.raises(ValueError, match=r'JPEGImages is missing; expected .*found Annotations, images'):
        build('pf_pascal', 'test', pascal)
    with pytest.raises(ValueError, match="split is 'train', choose from trn, val, test"):
        build('pf_pascal', 'test', pascal, split='train')

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS
from PIL import Image

import diffseg  # noqa: F401
from diffseg.datasets.toy import SPECIES


def digest(folder):
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def draw(load_tool):
    return load_tool('toy/make_data').main


@pytest.fixture
def folder(tmp_path, draw):
    draw([str(tmp_path / 'one'), '--train', '4', '--test', '2', '--pairs', '2', '--across', '1'])
    return tmp_path / 'one'


def test_the_same_seed_writes_the_same_bytes(folder, draw):
    again, other = folder.parent / 'two', folder.parent / 'three'
    draw([str(again), '--train', '4', '--test', '2', '--pairs', '2', '--across', '1'])
    draw([str(other), '--train', '4', '--test', '2', '--seed', '1'])
    assert digest(folder) == digest(again)
    assert not set(digest(folder).values()) & set(digest(other).values())


def test_part_segmentation_layout(folder):
    for split, count in (('train', 4), ('test', 2)):
        pictures = sorted((folder / 'toy/real' / split).glob('*.png'))
        assert len(pictures) == count
        for picture in pictures:
            labels = np.load(picture.with_suffix('.npy'))
            assert labels.shape == Image.open(picture).size[::-1] == (64, 64)
            assert labels.max() <= 7
    assert len(set(digest(folder / 'toy').values())) == 12  # no picture twice


@pytest.mark.parametrize('name, count', [('SPair-toy', 2 * 4), ('SPair-toy-across', 4 * 3)])
def test_pair_layout(folder, name, count):
    root = folder / name
    for split in ('trn', 'val', 'test'):
        stems = (root / 'Layout/large' / f'{split}.txt').read_text().split()
        assert len(stems) == count
        for stem in stems:
            pair = json.loads((root / 'PairAnnotation' / split / f'{stem}.json').read_text())
            _, source, target = stem.split(':')[0].split('-')
            assert (pair['src_imname'], pair['trg_imname']) == (f'{source}.jpg', f'{target}.jpg')
            assert len(pair['src_kps']) == len(pair['trg_kps']) == len(pair['kps_ids']) > 0
            for side in ('src', 'trg'):
                category, name = pair['category'], pair[f'{side}_imname']
                assert Image.open(root / 'JPEGImages' / category / name).size == (64, 64)
                path = root / 'ImageAnnotation' / category / name.replace('jpg', 'json')
                keypoints = json.loads(path.read_text())['kps']
                assert [keypoints[number] for number in pair['kps_ids']] == pair[f'{side}_kps']
                x1, y1, x2, y2 = pair[f'{side}_bndbox']
                silhouette = np.asarray(Image.open(root / 'Segmentation' / category / name.replace('jpg', 'png')))
                rows, columns = np.nonzero(silhouette)
                assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x1, y1, x2, y2)


def test_the_pictures_across_species_are_those_within(folder):
    within, across = (digest(folder / name) for name in ('SPair-toy', 'SPair-toy-across'))
    pictures = {path: value for path, value in across.items() if path.startswith('JPEGImages')}
    assert len(pictures) == 3 * 12 * 2
    assert set(pictures.values()) < set(within.values())
    stems = (folder / 'SPair-toy-across/Layout/large/test.txt').read_text().split()
    assert {stem.split(':')[1] for stem in stems} == {f'{a}_{b}' for a in SPECIES for b in SPECIES if a != b}
    for stem in stems:  # e.g. 000000-horse_test_000000-giraffe_test_000001:horse_giraffe
        pair, category = stem.split(':')
        assert [name.split('_')[0] for name in pair.split('-')[1:]] == category.split('_')


def test_base_config_of_pairs(folder):
    cfg = Config.fromfile(Path(__file__).parents[3] / 'configs/_base_/datasets/spair_toy.py')
    init_default_scope('mmseg')
    for name, count in (('SPair-toy', 2 * 4), ('SPair-toy-across', 4 * 3)):
        for split in ('train', 'val', 'test'):
            dataset = DATASETS.build({**cfg[f'{split}_dataloader'].dataset, 'data_root': str(folder / name)})
            assert len(dataset) == count and dataset.metainfo['dataset'] == name
            assert not dataset.damaged
            assert dataset[0]['inputs']['image0'].shape == (3, 64, 64)
            assert dataset.get_data_info(0)['swaps'] == ()


def test_stickers_lie_on_the_animals(tmp_path, draw):
    draw([str(tmp_path), '--train', '0', '--test', '6', '--size', '128', '--stickers'])
    stickers = sorted((tmp_path / 'toy/stickers/test').iterdir())
    assert [path.name for path in stickers] == sorted(path.name for path in (tmp_path / 'toy/real/test').glob('*.png'))
    for path in stickers:
        sticker, labels = np.asarray(Image.open(path)), np.load(tmp_path / 'toy/real/test' / f'{path.stem}.npy')
        drawn = sticker[..., 3] > 127
        assert sticker.shape == (128, 128, 4) and 100 < drawn.sum() < 128**2 / 4
        assert (labels[drawn] > 0).mean() > 0.8


def test_layout_of_mmseg(folder, draw):
    draw([str(folder), '--train', '4', '--test', '2', '--mmseg'])
    for split, count in (('train', 4), ('test', 2)):
        init_default_scope('mmseg')
        prefix = {'img_path': f'images/{split}', 'seg_map_path': f'labels/{split}'}
        config = {'type': 'BaseSegDataset', 'data_root': str(folder / 'toy-mmseg'), 'data_prefix': prefix}
        dataset = DATASETS.build(
            {
                **config,
                'img_suffix': '.png',
                'pipeline': [{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations'}],
            }
        )
        assert len(dataset) == count
        for sample in dataset:
            labels = np.load(folder / 'toy/real' / split / Path(sample['img_path']).with_suffix('.npy').name)
            assert np.array_equal(sample['gt_seg_map'], labels)


def test_unseen_keypoints_lie_between_those_of_the_same_pictures(folder, draw):
    draw([str(folder), '--train', '0', '--test', '0', '--unseen', '2'])
    init_default_scope('mmseg')
    dataset = DATASETS.build({'type': 'SPairUDataset', 'data_root': str(folder / 'SPair-U-toy'), 'test_mode': True})
    assert len(dataset) == 2 * 4 and not dataset.damaged
    for path in (folder / 'SPair-U-toy/JPEGImages').rglob('*.jpg'):
        name = path.relative_to(folder / 'SPair-U-toy/JPEGImages')
        assert path.read_bytes() == (folder / 'SPair-toy/JPEGImages' / name).read_bytes()
        seen, unseen = (
            json.loads((folder / f'{data}/ImageAnnotation' / name.with_suffix('.json')).read_text())['kps']
            for data in ('SPair-toy', 'SPair-U-toy')
        )
        eye, muzzle = seen['0'], seen['1']
        assert (unseen['0'] is None) == (eye is None or muzzle is None)
        if unseen['0'] is not None:
            assert np.abs(np.mean([eye, muzzle], axis=0) - unseen['0']).max() <= 1

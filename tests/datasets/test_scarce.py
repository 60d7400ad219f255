import random

import numpy as np
import pytest
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, TRANSFORMS
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


def build(folder, category='toy', split='real/train', labels=None, **options):
    init_default_scope('mmseg')
    pipeline = [{'type': 'LoadImageFromFile'}, {'type': 'LoadLabelArray', **(labels or {})}, {'type': 'PackSegInputs'}]
    return DATASETS.build(
        {
            'type': 'ScarceDataset',
            'category': category,
            'data_root': str(folder),
            'split': split,
            'pipeline': pipeline,
            **options,
        }
    )


def write(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.asarray(labels)
    Image.new('RGB', labels.shape[::-1]).save(path)
    np.save(path.with_suffix('.npy'), labels)


def test_pictures_and_labels_in_order(folder):
    dataset = build(folder, 'horse_21')
    assert len(dataset) == 2
    assert len(dataset.metainfo['classes']) == len(dataset.metainfo['palette']) == 21
    for index in range(2):
        item = dataset[index]
        assert item['inputs'].shape == (3, 4, 6)
        assert (item['data_samples'].gt_sem_seg.data == index).all()


@pytest.mark.parametrize(
    'category, classes, ignored',
    [
        ('horse_21', 21, 255),
        ('bedroom_28', 29, 0),
        ('ffhq_34', 34, 255),
        ('cat_15', 15, 255),
        ('celeba_19', 19, 255),
        ('ade_bedroom_30', 30, 255),
        ('toy', 8, 255),
    ],
)
def test_categories(folder, category, classes, ignored):
    meta = build(folder, category).metainfo
    assert len(set(meta['classes'])) == len(meta['palette']) == classes
    assert all(len(colour) == 3 and 0 <= min(colour) <= max(colour) <= 255 for colour in meta['palette'])
    assert meta['ignore_label'] == ignored


def test_ignored_label_becomes_255(folder):
    def labels(**options):
        return build(folder, 'bedroom_28', **options)[0]['data_samples'].gt_sem_seg.data.unique().tolist()

    assert labels() == [255]
    assert labels(ignore_label=255) == [0]


def test_every_kind_of_picture_below_the_folder(tmp_path):
    for name in ('b.jpg', 'a.PNG', 'deeper/c.jpeg'):
        write(tmp_path / 'real/test' / name, np.zeros((4, 4), dtype=np.uint8))
    names = [item['img_path'].rsplit('real/test/')[1] for item in build(tmp_path, split='real/test').load_data_list()]
    assert names == ['a.PNG', 'b.jpg', 'deeper/c.jpeg']


def test_resplit(tmp_path):
    for i in range(12):
        write(tmp_path / f'real/{"train" if i < 5 else "test"}/{i:02}.png', np.zeros((4, 4), dtype=np.uint8))

    def names(split, seed):
        return [
            item['img_path'][-6:-4] for item in build(tmp_path, split=f'real/{split}', resplit=seed).load_data_list()
        ]

    splits = [(names('train', seed), names('test', seed)) for seed in range(3)]
    for train, test in splits:
        assert (len(train), len(test)) == (5, 7)
        assert sorted(train + test) == [f'{i:02}' for i in range(12)]
    assert len({tuple(sorted(train)) for train, _ in splits}) == 3
    # GDF's split of the same seed: the global generator seeded, then one shuffle of train and test pictures
    pooled = [f'{i:02}' for i in range(12)]
    random.seed(1)
    random.shuffle(pooled)
    assert splits[1] == (pooled[:5], pooled[5:])
    with pytest.raises(ValueError, match='real/val'):
        build(tmp_path, split='real/val', resplit=0)


def test_labels_of_another_size_than_the_picture(tmp_path):
    labels = np.arange(16, dtype=np.int64).reshape(4, 4) % 3
    write(tmp_path / 'real/train/a.png', labels)
    item = build(tmp_path, labels={'size': (8, 2)})[0]
    sample = item['data_samples']
    assert item['inputs'].shape == (3, 4, 4)
    assert sample.ori_shape == (8, 2)
    assert sample.gt_sem_seg.data[0].tolist() == np.repeat(labels, 2, axis=0)[:, ::2].tolist()


def test_small_classes_are_ignored():
    labels = np.array([[0] * 6, [1] * 6, [2, 2, 2, 255, 1, 1]], dtype=np.uint8)
    result = TRANSFORMS.build({'type': 'IgnoreSmallClasses', 'min_pixels': 4})({'gt_seg_map': labels.copy()})
    assert result['gt_seg_map'].tolist() == [[0] * 6, [1] * 6, [255] * 4 + [1, 1]]
    assert result['gt_seg_map'].dtype == np.uint8
    kept = TRANSFORMS.build({'type': 'IgnoreSmallClasses', 'min_pixels': 3})({'gt_seg_map': labels.copy()})
    assert kept['gt_seg_map'].tolist() == labels.tolist()


def test_bad_input(folder):
    with pytest.raises(ValueError, match=r'unicorn.*horse_21, .*toy'):
        build(folder, 'unicorn')
    with pytest.raises(ValueError, match=r'no pictures \(\.png'):
        build(folder, split='real/test')
    np.save(folder / 'real/train/a.npy', np.zeros((4, 6)))
    with pytest.raises(ValueError, match='float64'):
        build(folder)[0]
    (folder / 'real/train/b.npy').unlink()
    with pytest.raises(ValueError, match=r'1 pictures.*b\.npy'):
        build(folder)

"""SPair-71k's layout, Diffusion Hyperfeatures' lists, and what happens to damaged files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import DATASETS
from PIL import Image

import diffseg  # noqa: F401
from diffseg.datasets import DamagedFile, SPairDataset, SPairUDataset
from diffseg.structures import PairSample

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT.parent / 'shared/data/SPair-71k-mini'
PIPELINE = ({'type': 'LoadPair'}, {'type': 'PackPair'})
PAIRS = [  # category, source, target, number of keypoints
    ('dog', 'a', 'b', 3),
    ('cat', 'c', 'd', 2),
    ('dog', 'b', 'a', 3),
]
SIZES = {'a': (40, 30), 'b': (32, 48), 'c': (20, 20), 'd': (25, 35)}  # (width, height)


def annotation(number, category, source, target, count):
    sides = {}
    for side, name, shift in (('src', source, 0), ('trg', target, 5)):
        sides |= {
            f'{side}_imname': f'{name}.jpg',
            f'{side}_imsize': [*SIZES[name], 3],
            f'{side}_bndbox': [1, 2, 15, 18],
            f'{side}_kps': [[shift + i, shift + 2 * i] for i in range(count)],
            f'{side}_pose': 'Left',
        }
    return {
        'pair_id': number, 'category': category, **sides, 'kps_ids': [str(2 * i) for i in range(count)], 'mirror': 1,
        'viewpoint_variation': 2, 'scale_variation': 0, 'truncation': 3, 'occlusion': 1,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for split in ('trn', 'test'):
        stems = []
        for number, (category, source, target, count) in enumerate(PAIRS):
            stems.append(f'{number:06d}-{source}-{target}:{category}')
            path = tmp_path / 'PairAnnotation' / split / f'{stems[-1]}.json'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(annotation(number, category, source, target, count)))
            for name in (source, target):
                image = tmp_path / 'JPEGImages' / category / f'{name}.jpg'
                image.parent.mkdir(parents=True, exist_ok=True)
                Image.new('RGB', SIZES[name], 'red').save(image)
        for layout, count in (('large', 3), ('small', 1)):
            path = tmp_path / 'Layout' / layout / f'{split}.txt'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('\n'.join(stems[:count]) + '\n')
    return tmp_path


def build(folder, split='test', **kwargs):
    init_default_scope('mmseg')
    options = {'type': 'SPairDataset', 'pipeline': PIPELINE, 'test_mode': split == 'test', **kwargs}
    return DATASETS.build({'data_root': str(folder), 'split': split, **options})


def test_a_sample(folder):
    dataset = build(folder)
    assert len(dataset) == 3
    assert [dataset[i]['data_samples'].category for i in range(3)] == ['cat', 'dog', 'dog']  # together, in order
    expected = {'dataset': 'SPair-71k', 'split': 'test', 'list': 'Layout/large/test.txt', 'num_pairs': 3}
    assert expected.items() <= dataset.metainfo.items()

    item = dataset[1]
    sample = item['data_samples']
    assert isinstance(sample, PairSample)
    for view, (name, shift) in enumerate((('a', 0), ('b', 5))):
        width, height = SIZES[name]
        image = item['inputs'][f'image{view}']
        assert image.dtype == torch.uint8 and image.shape == (3, height, width)
        assert sample.get(f'ori_shape{view}') == sample.get(f'img_shape{view}') == (height, width)
        assert sample.get(f'img_path{view}') == str(folder / f'JPEGImages/dog/{name}.jpg')
        points = sample.get(f'keypoints{view}')
        assert points.dtype == torch.float32
        assert points.tolist() == [[shift, shift], [shift + 1, shift + 2], [shift + 2, shift + 4]]
        assert sample.get(f'bbox{view}').tolist() == [1, 2, 15, 18]
    assert sample.visible.tolist() == [True] * 3
    assert sample.pair_id == '000000-a-b:dog'
    assert sample.variations == {
        'mirror': 1, 'viewpoint_variation': 2, 'scale_variation': 0, 'truncation': 3, 'occlusion': 1,
        'src_pose': 'Left', 'trg_pose': 'Left',
    }  # fmt: skip
    assert set(sample.metainfo_keys()) == {
        'img_path0', 'img_path1', 'category', 'pair_id', 'ori_shape0', 'ori_shape1', 'img_shape0', 'img_shape1',
        'variations',
    }  # fmt: skip


def test_choices(folder):
    assert len(build(folder, layout='small')) == 1
    cats = build(folder, categories=['cat'])
    assert [cats[i]['data_samples'].pair_id for i in range(len(cats))] == ['000001-c-d:cat']
    with pytest.raises(ValueError, match=r'category cow is not in .*: cat, dog'):
        build(folder, categories=['cow', 'cat'])
    with pytest.raises(ValueError, match=r"split is 'train', choose from trn, val, test"):
        build(folder, split='train')
    with pytest.raises(ValueError, match=r"layout is 'tiny', choose from large, small"):
        build(folder, layout='tiny')


@pytest.mark.parametrize('flat', [False, True])
def test_lists_of_diffusion_hyperfeatures(folder, flat):
    pairs = []
    for number, (category, source, target, count) in enumerate(PAIRS):
        pair = annotation(number, category, source, target, count)
        pairs.append({'category': category, 'mirror': 1})
        for ours, theirs in (('src', 'source'), ('trg', 'target')):
            pairs[-1] |= {
                f'{theirs}_path': pair[f'{ours}_imname'],
                f'{theirs}_points': pair[f'{ours}_kps'],
                f'{theirs}_bounding_box': pair[f'{ours}_bndbox'],
            }
            if flat:
                image = folder / 'JPEGImages' / pair[f'{ours}_imname']
                Image.new('RGB', SIZES[image.stem], 'red').save(image)
    (folder / 'list.json').write_text(json.dumps(pairs))
    listed, official = build(folder, ann_file='list.json'), build(folder)
    assert listed.metainfo['list'] == 'list.json'
    for index in range(3):
        ours, theirs = official[index]['data_samples'], listed[index]['data_samples']
        for key in ('keypoints0', 'keypoints1', 'bbox0', 'bbox1', 'visible'):
            assert torch.equal(ours.get(key), theirs.get(key))
        assert ours.ori_shape1 == theirs.ori_shape1
        assert Path(theirs.img_path0).parent.name == ('JPEGImages' if flat else ours.category)

    (folder / 'list.json').write_text('{"category": "dog"}')
    with pytest.raises(ValueError, match=r'list\.json: expected a list of pairs'):
        build(folder, ann_file='list.json')
    with pytest.raises(ValueError, match=r'other\.json: cannot be read as a list'):
        build(folder, ann_file='other.json')


@pytest.mark.parametrize('missing', ['JPEGImages', 'PairAnnotation/test', 'Layout/large/test.txt'])
def test_a_wrong_folder_says_what_is_missing_and_what_there_is(folder, missing):
    (folder / missing).rename(folder / 'elsewhere')
    with pytest.raises(ValueError, match=rf'{missing} is missing; expected JPEGImages, .*found .*elsewhere.*Unpack'):
        build(folder)
    with pytest.raises(ValueError, match='found nothing'):
        build(folder / 'nowhere')


def corrupt(folder, kind):
    """Damage one file of the first test pair and say which."""
    pair = folder / 'PairAnnotation/test/000000-a-b:dog.json'
    content = json.loads(pair.read_text())
    if kind == 'cut annotation':
        pair.write_text(pair.read_text()[:40])
    elif kind == 'annotation without a key':
        del content['trg_kps']
        pair.write_text(json.dumps(content))
    elif kind == 'other number of points':
        content['trg_kps'].pop()
        pair.write_text(json.dumps(content))
    elif kind == 'empty box':
        content['trg_bndbox'] = [5, 5, 5, 9]
        pair.write_text(json.dumps(content))
    elif kind == 'annotation absent':
        pair.unlink()
    elif kind == 'other size':
        content['src_imsize'] = [30, 40, 3]
        pair.write_text(json.dumps(content))
        return folder / 'JPEGImages/dog/a.jpg'
    elif kind == 'image absent':
        (folder / 'JPEGImages/dog/a.jpg').unlink()
        return folder / 'JPEGImages/dog/a.jpg'
    elif kind == 'cut image':
        image = folder / 'JPEGImages/dog/a.jpg'
        image.write_bytes(image.read_bytes()[:300])
        return image
    return pair


KINDS = [
    'cut annotation', 'annotation without a key', 'other number of points', 'empty box', 'annotation absent',
    'other size', 'image absent', 'cut image',
]  # fmt: skip


@pytest.mark.parametrize('kind', KINDS)
def test_damaged_files_are_named_and_counted_and_end_no_run(folder, kind):
    damaged = str(corrupt(folder, kind))
    dataset = build(folder)
    assert len(dataset) == dataset.metainfo['num_pairs'] == 3
    samples = [dataset[index] for index in range(3)]
    bad = [item for item in samples if 'damaged' in item['data_samples']]
    assert len(bad) == (2 if 'image' in kind else 1)  # the image is in two pairs
    for item in bad:
        assert item['data_samples'].damaged.startswith(damaged)
        assert item['data_samples'].category == 'dog'
        assert item['inputs'] == {'image0': None, 'image1': None}
    assert len(dataset.damaged) == 1 and dataset.damaged[0].startswith(damaged)  # named once
    batch = pseudo_collate(samples)
    assert [image is None for image in batch['inputs']['image0']] == ['damaged' in s for s in batch['data_samples']]


@pytest.mark.parametrize('kind', KINDS)
def test_strict_stops_at_damaged_files(folder, kind):
    damaged = str(corrupt(folder, kind))
    with pytest.raises(DamagedFile, match=damaged):
        dataset = build(folder, strict=True)
        for index in range(3):
            dataset[index]


def test_training_draws_another_pair(folder):
    (folder / 'PairAnnotation/trn/000000-a-b:dog.json').write_text('{}')
    (folder / 'JPEGImages/dog/a.jpg').write_bytes(b'no image')
    dataset = build(folder, split='trn')
    assert len(dataset) == 2
    assert {dataset[index]['data_samples'].category for index in range(2)} == {'cat'}
    assert len(dataset.damaged) == 2


def test_nothing_but_damage_is_an_error(folder):
    for path in folder.glob('PairAnnotation/test/*'):
        path.write_text('{}')
    with pytest.raises(ValueError, match=r"none of the 3 pairs .* first problem: .*json: has no '.*Unpack"):
        build(folder)


def test_exchanges_when_mirrored_are_permutations():
    assert set(SPairDataset.METAINFO['swaps']) == {
        'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'dog', 'horse',
        'motorbike', 'person', 'pottedplant', 'sheep', 'train', 'tvmonitor',
    }  # fmt: skip
    for swaps in SPairDataset.METAINFO['swaps'].values():
        ids = [number for pair in swaps for number in pair]
        assert len(ids) == len(set(ids)) and set(ids) <= set(range(30))


def test_base_config_and_batches_of_different_sizes(folder):
    cfg = Config.fromfile(ROOT / 'configs/_base_/datasets/spair.py')
    loader = cfg.test_dataloader
    loader.dataset.data_root = str(folder)
    loader.update(batch_size=3, num_workers=0, persistent_workers=False)
    loader.dataset.pipeline[1].update(size=(48, 64), keep_ratio=True)
    init_default_scope('mmseg')
    (batch,) = Runner.build_dataloader(loader)
    assert [tuple(image.shape) for image in batch['inputs']['image1']] == [(3, 48, 34), (3, 48, 32), (3, 48, 64)]
    assert [sample.img_shape1 for sample in batch['data_samples']] == [(48, 34), (48, 32), (48, 64)]
    assert [sample.ori_shape1 for sample in batch['data_samples']] == [(35, 25), (48, 32), (30, 40)]


def test_real_pairs():
    if not MINI.is_dir():
        pytest.skip(f'real pairs absent: {MINI}')
    official, listed = build(MINI, strict=True), build(MINI, strict=True, ann_file='spair_71k_test-6.json')
    assert len(official) == len(listed) == 6
    for index in range(6):
        ours, theirs = official[index]['data_samples'], listed[index]['data_samples']
        assert ours.img_path0 == theirs.img_path0 and ours.ori_shape0 == theirs.ori_shape0
        for view in (0, 1):
            points, (height, width) = ours.get(f'keypoints{view}'), ours.get(f'ori_shape{view}')
            assert torch.equal(points, theirs.get(f'keypoints{view}'))
            assert (points >= 0).all() and (points <= torch.tensor([width, height])).all()
            assert (ours.get(f'bbox{view}')[2:] > ours.get(f'bbox{view}')[:2]).all()


def test_unseen_keypoints(folder):
    """SPair-U: no layout, no ids, and only the test pairs that are annotated."""
    shutil.rmtree(folder / 'Layout')
    for path in sorted((folder / 'PairAnnotation/test').iterdir()):
        content = json.loads(path.read_text())
        del content['kps_ids']
        path.write_text(json.dumps(content))
    path.unlink()
    init_default_scope('mmseg')
    dataset = SPairUDataset(str(folder), pipeline=PIPELINE, test_mode=True, strict=True)
    assert len(dataset) == 2 and dataset.metainfo['dataset'] == 'SPair-U'
    sample = dataset[0]['data_samples']
    assert sample.keypoints1.tolist() == [[5 + i, 5 + 2 * i] for i in range(len(sample.keypoints1))]
    assert 'mirror_rows' not in sample and dataset[0]['inputs']['image0'].shape[0] == 3
    with pytest.raises(ValueError, match="split is 'val', SPair-U has only 'test'"):
        SPairUDataset(str(folder), 'val')
    shutil.rmtree(folder / 'JPEGImages')
    with pytest.raises(ValueError, match=r'JPEGImages is missing; .*ln -s'):
        SPairUDataset(str(folder))

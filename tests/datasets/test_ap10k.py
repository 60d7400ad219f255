"""AP-10K's layout as GeoAware-SC pairs it, and what happens to files that are missing or damaged."""

import json
import runpy
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS
from PIL import Image

import diffseg  # noqa: F401
from diffseg.datasets import AP10KDataset, ToyAP10KDataset

ROOT = Path(__file__).resolve().parents[2]
PAIRS = {  # folder: source, target, category
    'trn': ('Felidae/cat/000000000001', 'Felidae/cat/000000000002', 'cat'),
    'test': ('Felidae/cat/000000000002', 'Felidae/cat/000000000001', 'cat'),
    'test_cross_species': ('Felidae/cat/000000000001', 'Felidae/king cheetah/000000000003', 'Felidae'),
    'test_cross_family': ('Canidae/dog/000000000004', 'Felidae/cat/000000000001', 'all'),
}


def annotation(shift):
    """Keypoints i at (shift + i, 2 i); keypoint 3 is not annotated, and 5 only if `shift` is even."""
    flags = [0 if i == 3 or (i == 5 and shift % 2) else 2 - i % 2 for i in range(17)]
    points = [value for i, flag in enumerate(flags) for value in (shift + i, 2 * i, flag)]
    return {'keypoints': points, 'bbox': [1, 2, 20, 30], 'width': 40, 'height': 50}


@pytest.fixture
def folder(tmp_path):
    for split, (*names, category) in PAIRS.items():
        for name in names:
            shift = int(name[-1])
            for kind, suffix in (('JPEGImages', 'jpg'), ('ImageAnnotation', 'json')):
                path = tmp_path / kind / f'{name}.{suffix}'
                path.parent.mkdir(parents=True, exist_ok=True)
                if suffix == 'jpg':
                    Image.new('RGB', (40, 50), (10 * shift, 0, 0)).save(path)
                else:
                    path.write_text(json.dumps(annotation(shift)))
        paths = {
            f'{side}_json_path': f'{prefix}/ImageAnnotation/{name}.json'
            for side, name, prefix in zip(('src', 'trg'), names, ('data/ap-10k', '/home/me/ap-10k'), strict=True)
        }
        path = tmp_path / 'PairAnnotation' / split / f'{"-".join(Path(name).name for name in names)}:{category}.json'
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(paths))
    return tmp_path


def build(folder, **kwargs):
    cfg = Config.fromfile(ROOT / 'configs/_base_/datasets/ap10k.py').test_dataloader.dataset
    init_default_scope('mmseg')
    return DATASETS.build({**cfg, 'data_root': str(folder), **kwargs})


def test_one_pair_of_each_protocol(folder):
    for protocol, split in (
        ('intra-species', 'test'),
        ('cross-species', 'test_cross_species'),
        ('cross-family', 'test_cross_family'),
    ):
        source, target, category = PAIRS[split]
        dataset = build(folder, protocol=protocol, strict=True)
        assert len(dataset) == 1
        assert dataset.metainfo['protocol'] == protocol and dataset.metainfo['list'] == f'PairAnnotation/{split}'
        sample = dataset[0]['data_samples']
        assert sample.category == ('cross-family' if category == 'all' else category)
        for view, name in enumerate((source, target)):
            assert sample.get(f'img_path{view}') == str(folder / f'JPEGImages/{name}.jpg')
            assert sample.get(f'ori_shape{view}') == (50, 40) and sample.get(f'img_shape{view}') == (512, 512)
            shift = int(name[-1])
            assert sample.get(f'keypoints{view}').tolist() == [[shift + i, 2 * i] for i in range(17)]
            assert sample.get(f'bbox{view}').tolist() == [1, 2, 21, 32]
        hidden = {3} | ({5} if int(source[-1]) % 2 or int(target[-1]) % 2 else set())
        assert sample.visible.tolist() == [i not in hidden for i in range(17)]


def test_left_and_right_are_exchanged_by_mirroring(folder):
    names = (
        'left eye', 'right eye', 'nose', 'neck', 'root of tail', 'left shoulder', 'left elbow', 'left front paw',
        'right shoulder', 'right elbow', 'right front paw', 'left hip', 'left knee', 'left back paw', 'right hip',
        'right knee', 'right back paw',
    )  # fmt: skip
    swaps = build(folder).get_data_info(0)['swaps']
    assert {names[left].replace('left', 'right') for left, _ in swaps} == {names[right] for _, right in swaps}
    assert all(names[left].replace('left', 'right') == names[right] for left, right in swaps) and len(swaps) == 7


def test_bad_arguments(folder):
    with pytest.raises(ValueError, match="protocol is 'species', choose from intra-species, cross-species"):
        build(folder, protocol='species')
    with pytest.raises(ValueError, match="split is 'train'"):
        build(folder, split='train')
    with pytest.raises(ValueError, match='there are no training pairs cross-family'):
        build(folder, split='trn', protocol='cross-family')
    with pytest.raises(ValueError, match=r'val_cross_species is missing; .*prepare_ap10k\.ipynb'):
        build(folder, split='val', protocol='cross-species')
    assert len(build(folder, split='trn')) == 1


def test_damaged_pairs(folder):
    pair = folder / 'PairAnnotation/test' / '000000000002-000000000001:cat.json'
    for number, content in enumerate(({}, {'src_json_path': 'a.json', 'trg_json_path': 'b.json'})):
        (pair.parent / f'{number}:cat.json').write_text(json.dumps(content))
    dataset = build(folder)
    assert len(dataset) == 3
    assert "0:cat.json: has no 'src_json_path'" in dataset.damaged[0]
    assert "names the annotation 'a.json', expected .../ImageAnnotation/FAMILY" in dataset.damaged[1]
    assert sum('damaged' in dataset[i]['data_samples'] for i in range(3)) == 2
    image, image_annotation = (
        folder / f'{kind}/Felidae/cat/000000000001.{suffix}'
        for kind, suffix in (('JPEGImages', 'jpg'), ('ImageAnnotation', 'json'))
    )
    image.unlink()
    with pytest.raises(ValueError, match=f'{image} is missing'):
        build(folder, split='trn')
    image_annotation.write_text(json.dumps(annotation(1) | {'keypoints': [1, 2, 2]}))
    with pytest.raises(ValueError, match='has 1 source keypoints and 17 target keypoints'):
        build(folder, split='trn')
    image_annotation.unlink()
    with pytest.raises(ValueError, match=f'No such file.*{image_annotation}'):
        build(folder, split='trn')


def test_toy_pairs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools/toy'))
    arguments = [str(tmp_path), '--train', '0', '--test', '0', '--ap10k', '1', '--pairs', '1']
    runpy.run_path(str(ROOT / 'tools/toy/make_data.py'))['main'](arguments)
    root = tmp_path / 'ap-10k-toy'
    pipeline = [{'type': 'LoadPair'}, {'type': 'PackPair'}]
    init_default_scope('mmseg')
    counts = {'intra-species': 4, 'cross-species': 2, 'cross-family': 2}
    for protocol, count in counts.items():
        for split in ('val', 'test'):
            dataset = ToyAP10KDataset(str(root), split, protocol, pipeline=pipeline, test_mode=True, strict=True)
            assert len(dataset) == count
            samples = [dataset[i]['data_samples'] for i in range(count)]
            assert all(len(sample.visible) == 14 and sample.visible.sum() >= 3 for sample in samples)
            species = [[Path(sample.get(f'img_path{view}')).parent.name for view in (0, 1)] for sample in samples]
            families = [[Path(sample.get(f'img_path{view}')).parts[-3] for view in (0, 1)] for sample in samples]
            assert all((a == b) == (protocol == 'intra-species') for a, b in species)
            assert all((a != b) == (protocol == 'cross-family') for a, b in families)
    assert len(ToyAP10KDataset(str(root), 'trn', pipeline=pipeline)) == 4
    pictures = {path.read_bytes() for path in (tmp_path / 'SPair-toy/JPEGImages').rglob('*.jpg')}
    assert {path.read_bytes() for path in (root / 'JPEGImages').rglob('*.jpg')} == pictures
    with pytest.raises(ValueError, match='Draw them with'):
        ToyAP10KDataset(str(tmp_path), 'test')
    assert AP10KDataset.SWAPS != ToyAP10KDataset.SWAPS == ()

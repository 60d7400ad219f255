"""Birds: Neural Congealing's subsets with ACSM's crop, and random pairs."""

from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS
from PIL import Image
from scipy.io import savemat

import diffseg  # noqa: F401

CONFIG = Path(__file__).resolve().parents[2] / 'configs/_base_/datasets/cub.py'
BIRDS = [f'001.Albatross/bird_{number}.jpg' for number in range(1, 5)]
BOX = (6, 11, 25, 20)  # of every bird, from 1, ends inclusive: 20 x 10 pixels


@pytest.fixture
def folder(tmp_path):
    cub, metadata = tmp_path / 'CUB_200_2011', tmp_path / 'cub_metadata'
    (cub / 'images/001.Albatross').mkdir(parents=True)
    (cub / 'parts').mkdir()
    metadata.mkdir()
    parts, rng = [], np.random.default_rng(0)
    for number, path in enumerate(BIRDS, start=1):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(cub / 'images' / path)
        for part in range(1, 16):
            parts.append(f'{number} {part} {5 + part}.0 {10 + 0.5 * part} {int(part != number)}')
    (cub / 'parts/part_locs.txt').write_text('\n'.join(parts) + '\n')
    (cub / 'images.txt').write_text('\n'.join(f'{n} {path}' for n, path in enumerate(BIRDS, start=1)) + '\n')
    (cub / 'bounding_boxes.txt').write_text('\n'.join(f'{n} 6.0 11.0 20.0 10.0' for n in range(1, 5)) + '\n')
    (cub / 'train_test_split.txt').write_text('1 1\n2 0\n3 0\n4 0\n')
    images = np.array(
        [
            (path, number, dict(zip(('x1', 'y1', 'x2', 'y2'), BOX, strict=True)))
            for number, path in enumerate(BIRDS, start=1)
        ],
        dtype=[('rel_path', object), ('id', object), ('bbox', object)],
    )
    savemat(metadata / 'acsm_val_cub_cleaned.mat', {'images': images})
    for subset in range(14):
        names = BIRDS[:3] if subset == 0 else BIRDS[1:3]
        lines = ''.join(f'CUB_200_2011/images/{name}\n' for name in names)
        (metadata / f'cub_subset_{subset}_original_paths.txt').write_text(lines)
    return tmp_path


def build(folder, **kwargs):
    cfg = Config.fromfile(CONFIG).test_dataloader.dataset
    init_default_scope('mmseg')
    return DATASETS.build({**cfg, 'data_root': str(folder), **kwargs})


def test_subsets_pair_each_with_each_in_both_directions(folder):
    dataset = build(folder, strict=True)
    assert len(dataset) == 3 * 2 + 13 * 2
    samples = [dataset.get_data_info(index) for index in range(6)]
    assert {sample['variations']['subset'] for sample in samples} == {0}
    pairs = {(Path(sample['img_path0']).stem, Path(sample['img_path1']).stem) for sample in samples}
    assert pairs == {(f'bird_{i}', f'bird_{j}') for i in (1, 2, 3) for j in (1, 2, 3) if i != j}
    assert len({dataset.get_data_info(index)['pair_id'] for index in range(len(dataset))}) == len(dataset)
    assert len(build(folder, subset=3)) == 2
    assert samples[0]['swaps'] == ((6, 10), (7, 11), (8, 12))


def test_acsm_crop(folder):
    """By hand: from 0 the box is (5, 10, 24, 19); 5 % wider (4, 9.5, 25, 19.5), rounded (4, 10, 25, 20), square with
    side 22 from y = 10 - round(5.5) = 4. Keypoint i (from 1) is at (4 + i, 9 + i / 2) from 0."""
    item = build(folder)[0]
    sample = item['data_samples']
    assert sample.ori_shape0 == (256, 256) and sample.img_shape0 == (512, 512) and sample.category == 'bird'
    assert sample.visible.tolist() == [False, False, *[True] * 13]  # part 1 of bird 1 and part 2 of bird 2 are hidden
    scale = 256 / 22
    for part in (1, 15):
        x, y = sample.keypoints0[part - 1].tolist()
        assert (x, y) == pytest.approx((part * scale, (5 + part / 2) * scale), rel=1e-5)
    assert sample.bbox0.tolist() == pytest.approx([scale, 6 * scale, 20 * scale, 15 * scale], rel=1e-5)

    init_default_scope('mmseg')
    pipeline = [{'type': 'LoadPair'}, {'type': 'CropToBoxPair', 'size': 22}, {'type': 'PackPair'}]
    image = build(folder, pipeline=pipeline)[0]['inputs']['image0']
    original = np.asarray(Image.open(folder / 'CUB_200_2011/images' / BIRDS[0]))
    np.testing.assert_array_equal(image.permute(1, 2, 0), original[4:26, 4:26])


def test_the_crop_repeats_the_edge_outside_the_image(folder):
    pipeline = [{'type': 'LoadPair'}, {'type': 'CropToBoxPair', 'size': 44, 'padding': 0.6}, {'type': 'PackPair'}]
    image = build(folder, pipeline=pipeline)[0]['inputs']['image0'].permute(1, 2, 0)
    # the box (5, 10, 24, 19) widened by (12, 6) is (-7, 4, 36, 25): 44 x 22, squared from y = 4 - 11 = -7
    original = np.asarray(Image.open(folder / 'CUB_200_2011/images' / BIRDS[0]))
    np.testing.assert_array_equal(image[7:, 7:], original[:37, :37])
    np.testing.assert_array_equal(image[:7, 7:], np.repeat(original[:1, :37], 7, axis=0))


def test_random_pairs(folder):
    options = {'protocol': 'random', 'num_pairs': 20, 'pipeline': [{'type': 'LoadPair'}, {'type': 'PackPair'}]}
    dataset = build(folder, **options)
    infos = [dataset.get_data_info(index) for index in range(20)]
    paths = [(info['img_path0'], info['img_path1']) for info in infos]
    again, other = (build(folder, **options, seed=seed) for seed in (0, 1))
    assert paths == [(again.get_data_info(i)['img_path0'], again.get_data_info(i)['img_path1']) for i in range(20)]
    assert paths != [(other.get_data_info(i)['img_path0'], other.get_data_info(i)['img_path1']) for i in range(20)]
    assert {Path(path).stem for pair in paths for path in pair} == {'bird_2', 'bird_3', 'bird_4'}  # the test half
    assert all(source != target for source, target in paths)
    sample = dataset[0]['data_samples']
    assert sample.ori_shape0 == (40, 50)
    assert sample.bbox0.tolist() == [5, 10, 25, 20]
    assert sample.keypoints0[0].tolist() == [5, 9.5]


def test_bad_input(folder):
    with pytest.raises(ValueError, match="protocol is 'all', choose 'subsets' or 'random'"):
        build(folder, protocol='all')
    with pytest.raises(ValueError, match=r'subset is 14, choose one of 0\.\.13'):
        build(folder, subset=14)
    names = folder / 'cub_metadata/cub_subset_0_original_paths.txt'
    names.write_text(names.read_text() + 'CUB_200_2011/images/unknown.jpg\n')
    dataset = build(folder)
    assert len(dataset) == 4 * 3 + 13 * 2
    assert dataset.damaged == [f'{names}: names unknown.jpg, which acsm_val_cub_cleaned.mat does not have']
    (folder / 'cub_metadata/acsm_val_cub_cleaned.mat').write_bytes(b'no')
    with pytest.raises(ValueError, match=r'acsm_val_cub_cleaned\.mat: cannot be read'):
        build(folder)
    (folder / 'CUB_200_2011/parts/part_locs.txt').write_text('1 1 2\n')
    with pytest.raises(ValueError, match=r'part_locs\.txt: expected 15 lines'):
        build(folder)
    names.unlink()
    with pytest.raises(ValueError, match=r'CUB_200_2011/images is missing; .*found nothing\. Unpack'):
        build(folder / 'nowhere')

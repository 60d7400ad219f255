"""HPatches' layout, where points come from, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS
from PIL import Image

from diffseg.datasets import HPatchesDataset
from diffseg.datasets.hpatches import TOO_LARGE, read_homography
from diffseg.structures import HomographySample

SIZE = 48, 40  # (width, height)
HOMOGRAPHY = '1 0.1 2\n0 1.5 -3\n1e-4 0 1\n'
PIPELINE = [{'type': 'LoadPair'}, {'type': 'ResizePair', 'size': 64}, {'type': 'PackHomographyPair'}]
DETECT = {'type': 'DetectKeypoints', 'num_points': 5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sequences, one that is left out, points of all images, and a file beside."""
    rng = np.random.default_rng(0)
    root = tmp_path / 'hpatches-sequences-release'
    for name in ('v_wall', 'i_dome', TOO_LARGE[0]):
        (root / name).mkdir(parents=True)
        for number in range(1, 7):
            pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize(SIZE, Image.Resampling.BICUBIC).save(root / name / f'{number}.ppm')
            if number > 1:
                (root / name / f'H_1_{number}').write_text(HOMOGRAPHY.replace('2', str(number)))
    (root / 'README').write_text('')
    points = tmp_path / 'points'
    points.mkdir()
    for name in ('v_wall', 'i_dome'):
        for number in range(1, 7):
            (points / f'{name}-{number}.kp').write_text(f'30 {number}\n7.5 2\n30 {number}\n')
    return root


def make(folder: Path, **options) -> HPatchesDataset:
    init_default_scope('mmseg')
    config = {'type': 'HPatchesDataset', 'data_root': str(folder), 'pipeline': PIPELINE}
    return DATASETS.build({**config, 'keypoints': str(folder.parent / 'points'), **options})


def test_pairs_of_a_sequence_follow_each_other_and_those_too_large_are_left_out(folder):
    dataset = make(folder)
    assert [dataset.get_data_info(i)['pair_id'] for i in range(len(dataset))] == [
        f'{name}-1-{number}' for name in ('i_dome', 'v_wall') for number in range(2, 7)
    ]
    assert dataset.metainfo['num_sequences'] == 2
    assert len(make(folder, exclude=['i_dome', *TOO_LARGE])) == 5


def test_the_published_choice_of_sequences():
    """116 sequences, of which 52 and 56 remain."""
    assert len(set(TOO_LARGE)) == 8
    assert 57 - sum(name[0] == 'i' for name in TOO_LARGE) == 52 and 59 - sum(name[0] == 'v' for name in TOO_LARGE) == 56


def test_a_sample(folder):
    packed = make(folder)[9]
    sample = packed['data_samples']
    assert isinstance(sample, HomographySample) and sample.sequence == 'v_wall'
    assert [Path(sample.get(f'img_path{view}')).name for view in (0, 1)] == ['1.ppm', '6.ppm']
    assert sample.ori_shape0 == sample.ori_shape1 == SIZE[::-1] and sample.img_shape1 == (64, 64)
    assert packed['inputs']['image1'].shape == (3, 64, 64) and packed['inputs']['image1'].dtype == torch.uint8
    assert sample.homography.dtype == torch.float64
    assert sample.homography.tolist() == [[1, 0.1, 6], [0, 1.5, -3], [1e-4, 0, 1]]
    # in original pixels, each once
    assert sample.keypoints0.tolist() == [[7.5, 2], [30, 1]] and sample.keypoints1.tolist() == [[7.5, 2], [30, 6]]
    assert sample.keypoints0.dtype == torch.float32 and sample.keypoint_source == str(folder.parent / 'points')


@pytest.mark.parametrize('suffix', ['.txt', '.csv', '.npy'])
def test_points_in_other_files(folder, suffix):
    points = folder.parent / 'points'
    for path in points.iterdir():
        if suffix == '.npy':
            np.save(path.with_suffix(suffix), np.loadtxt(path))
        else:
            path.with_suffix(suffix).write_text(path.read_text().replace(' ', ',' if suffix == '.csv' else ' '))
        path.unlink()
    assert make(folder)[0]['data_samples'].keypoints0.tolist() == [[7.5, 2], [30, 1]]


def test_points_are_detected_where_no_files_are_given(folder):
    pipeline = [PIPELINE[0], DETECT, *PIPELINE[1:]]
    sample = make(folder, keypoints=None, pipeline=pipeline)[0]['data_samples']
    assert sample.keypoint_source == '5 of SIFT'
    for points in (sample.keypoints0, sample.keypoints1):
        assert points.shape == (5, 2) and (points >= 0).all() and (points < torch.tensor(SIZE)).all()
    assert make(folder, pipeline=pipeline)[0]['data_samples'].keypoints0.tolist() == [[7.5, 2], [30, 1]]
    with pytest.raises(ValueError, match=r'1\.ppm: has no points.*DetectKeypoints'):
        make(folder, keypoints=None)[0]


@pytest.mark.parametrize('name', ['3.ppm', 'H_1_4'])
def test_missing_files_are_named(folder, name):
    (folder / 'v_wall' / name).unlink()
    with pytest.raises(ValueError, match=f'v_wall/{name}'):
        make(folder)


def test_missing_points_are_named(folder):
    (folder.parent / 'points/v_wall-5.kp').unlink()
    with pytest.raises(ValueError, match=r'v_wall-5\.kp is missing .*keypoints=None'):
        make(folder)


def test_damaged_images_are_named(folder):
    (folder / 'v_wall/1.ppm').write_bytes((folder / 'v_wall/1.ppm').read_bytes()[:100])
    with pytest.raises(ValueError, match=r'v_wall/1\.ppm: cannot be read as an image'):
        make(folder)[5]


@pytest.mark.parametrize(
    ('content', 'problem'),
    [
        ('1 0 0\n0 1 0\n', 'three lines of three'),
        ('1 0 0\n0 1 0\n0 nan 1\n', 'finite'),
        ('1 0 0\n0 one 0\n0 0 1\n', 'cannot be read as a homography'),
        ('1 2 3\n2 4 6\n0 0 1\n', 'is singular'),
    ],
)
def test_bad_homographies_are_named(folder, content, problem):
    (folder / 'i_dome/H_1_2').write_text(content)
    with pytest.raises(ValueError, match=f'i_dome/H_1_2: .*{problem}'):
        make(folder)


def test_a_real_homography_is_not_taken_for_singular(tmp_path):
    """Entries of very different size, as in v_ sequences of large images."""
    (tmp_path / 'H_1_2').write_text('0.1 -0.02 1800\n0.03 0.09 900\n-1e-06 2e-06 1\n')
    assert np.linalg.det(read_homography(tmp_path / 'H_1_2')) < 0.011


def test_points_outside_the_image_are_refused(folder):
    (folder.parent / 'points/i_dome-1.kp').write_text('30 10\n52 10\n')
    with pytest.raises(ValueError, match=r'i_dome/1\.ppm: has 48 x 40 pixels, but points from .* original size'):
        make(folder)[0]


def test_a_folder_without_sequences_is_refused(folder):
    with pytest.raises(ValueError, match=r'has no sequence.*make_hpatches'):
        make(folder.parent)
    shutil.rmtree(folder / 'i_dome')
    with pytest.raises(ValueError, match='not excluded'):
        make(folder, exclude=['v_wall', *TOO_LARGE])

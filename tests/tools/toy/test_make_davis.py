import hashlib

import numpy as np
import pytest

from diffseg.datasets import DAVISDataset, JHMDBDataset, LoadVideo
from diffseg.datasets.toy import KEYPOINTS
from diffseg.masks import read_mask

SMALL = ['--frames', '3', '--size', '32', '48', '--train', '1', '--val', '2']


@pytest.fixture
def draw(load_tool):
    return load_tool('toy/make_davis').main


def digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob('*.*')
    }


@pytest.mark.parametrize('kind', [[], ['--jhmdb']])
def test_the_same_seed_writes_the_same_bytes(tmp_path, draw, kind):
    for name, seed in (('one', '0'), ('two', '0'), ('three', '1')):
        draw([str(tmp_path / name), '--seed', seed, *SMALL, *kind])
    one, two, three = (digest(tmp_path / name) for name in ('one', 'two', 'three'))
    assert one == two
    assert one != three


def test_davis_layout(tmp_path, draw):
    draw([str(tmp_path), *SMALL])
    for split, count in (('train', 1), ('val', 2)):
        dataset = DAVISDataset(str(tmp_path / 'DAVIS-toy'), split, pipeline=[LoadVideo(short_side=32)])
        assert len(dataset) == count
        for sample in (each['data_samples'] for each in dataset):
            assert (sample.num_frames, sample.ori_shape) == (3, (32, 48))
            objects = sample.video_id.split(split)[0].count('-')
            masks = [read_mask(path, sample.ori_shape) for path in sample.annotation_paths]
            assert np.max(masks) == sample.first_mask.max() == objects


def test_jhmdb_layout(tmp_path, draw):
    draw([str(tmp_path), '--jhmdb', *SMALL])
    dataset = JHMDBDataset(str(tmp_path / 'JHMDB-toy'), 'test.txt', pipeline=[LoadVideo(size=(64, 64))])
    assert len(dataset) == 2
    sample = dataset[0]['data_samples']
    assert sample.joints.shape == (3, len(KEYPOINTS) + 1, 2)
    between = sample.joints[:, [KEYPOINTS.index('back'), KEYPOINTS.index('belly')]].mean(dim=1)
    assert np.allclose(sample.joints[:, -1], between, atol=1e-4)


def test_a_refusal_is_one_line(tmp_path, draw, capsys):
    with pytest.raises(SystemExit):
        draw([str(tmp_path), '--frames', '1'])
    assert capsys.readouterr().err.splitlines()[-1].endswith('error: frames is 1, toy clips need at least 2')

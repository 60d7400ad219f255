"""Toy sequences in HPatches' layout: the homographies are those between the pictures."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from diffseg.datasets import HPatchesDataset

SMALL = '--size', '48', '64'


@pytest.fixture
def draw(load_tool: Callable) -> Callable:
    return load_tool('toy/make_hpatches').main


def digest(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob('*') if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=np.float32)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_the_same_seed_writes_the_same_bytes(draw, tmp_path):
    for name, seed in (('one', '0'), ('two', '0'), ('three', '1')):
        assert draw([str(tmp_path / name), '--sequences', '1', '--seed', seed, *SMALL]) == 0
    one, two, three = (digest(tmp_path / name) for name in ('one', 'two', 'three'))
    assert one == two and len(one) == 2 * 11
    assert not {one[name] for name in one if '.ppm' in name} & set(three.values())


def test_homographies_take_the_first_image_to_the_others(draw, tmp_path):
    draw([str(tmp_path), '--sequences', '1', *SMALL])
    for pair in HPatchesDataset(str(tmp_path / 'HPatches-toy')):
        first, other = pixels(pair['img_path0']), pixels(pair['img_path1'])
        assert first.shape == other.shape == (48, 64, 3)
        homography = pair['homography']
        if pair['sequence'].startswith('i_'):
            assert np.array_equal(homography, np.eye(3)) and correlation(first, other) > 0.3
            continue
        warped = cv2.warpPerspective(first, homography, (64, 48))
        seen = cv2.warpPerspective(np.ones((48, 64)), homography, (64, 48)) > 0.999
        assert correlation(warped[seen], other[seen]) > 0.9
        assert correlation(warped[seen], other[seen]) > correlation(first[seen], other[seen]) + 0.1


def test_changes_grow(draw, tmp_path):
    draw([str(tmp_path), '--sequences', '3', *SMALL])
    pairs = list(HPatchesDataset(str(tmp_path / 'HPatches-toy')))
    assert len(pairs) == 30
    for kind in 'iv':
        alike = [
            np.mean([
                correlation(pixels(pair['img_path0']), pixels(pair['img_path1']))
                for pair in pairs
                if pair['sequence'][0] == kind and pair['pair_id'].endswith(str(number))
            ])
            for number in (2, 6)
        ]  # fmt: skip
        assert alike[0] > alike[1]


def test_real_pictures(draw, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / 'pictures').mkdir()
    for name in ('b.jpg', 'a.png', 'c.png'):
        image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        image.resize((120, 90), Image.Resampling.BICUBIC).save(tmp_path / 'pictures' / name)
    arguments = [str(tmp_path), '--images', str(tmp_path / 'pictures'), '--sequences', '2', *SMALL]
    assert draw(arguments) == 0
    names = sorted(path.name for path in (tmp_path / 'HPatches-toy').iterdir())
    assert names == ['i_a', 'i_b', 'v_a', 'v_b']
    middle = Image.open(tmp_path / 'pictures/a.png').resize((64, 48), box=(30, 22.5, 90, 67.5))
    assert correlation(pixels(tmp_path / 'HPatches-toy/v_a/1.ppm'), np.asarray(middle)) > 0.95


def test_errors(draw, tmp_path, capsys):
    for arguments, problem in [
        (['--sequences', '0'], '0 sequences'),
        (['--size', '16', '64'], 'at least 1, of 32 x 32'),
        (['--images', str(tmp_path)], 'has no image'),
        (['--images', str(tmp_path / 'missing')], 'missing'),
    ]:
        assert draw([str(tmp_path / 'out'), *arguments]) == 2
        assert problem in capsys.readouterr().err

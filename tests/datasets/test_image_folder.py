from pathlib import Path

import pytest
from PIL import Image

from diffseg.datasets import ImageFolderDataset


@pytest.fixture
def folder(tmp_path):
    for index in range(8):
        path = tmp_path / 'pictures' / f'{index % 2}' / f'{index}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 4)).save(path)
    (tmp_path / 'pictures' / 'labels.npy').write_bytes(b'')
    return tmp_path / 'pictures'


def paths(folder, part, held_out=3):
    dataset = ImageFolderDataset(data_root=str(folder), part=part, held_out=held_out)
    return [Path(dataset.get_data_info(i)['img_path']) for i in range(len(dataset))]


def test_parts_are_disjoint_and_complete_and_do_not_depend_on_the_place(folder):
    train, val = paths(folder, 'train'), paths(folder, 'val')
    assert (len(train), len(val)) == (5, 3) and not set(train) & set(val)
    assert set(train) | set(val) == set(folder.rglob('*.png'))
    moved = folder.rename(folder.with_name('moved'))
    assert [path.relative_to(moved) for path in paths(moved, 'val')] == [path.relative_to(folder) for path in val]


def test_errors(folder, tmp_path):
    with pytest.raises(ValueError, match="part is 'test'"):
        paths(folder, 'test')
    with pytest.raises(FileNotFoundError, match='none is no folder'):
        paths(tmp_path / 'none', 'train')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='no images in'):
        paths(tmp_path / 'empty', 'train')
    for held_out in (0, 8):
        with pytest.raises(ValueError, match=f'held_out is {held_out}, of 8 pictures'):
            paths(folder, 'train', held_out)

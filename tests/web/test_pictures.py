"""The folder of pictures: what is listed, added, read and refused."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from mmseg.models import SegDataPreProcessor
from PIL import Image

from diffseg.web.pictures import PictureFolder, TooLargeError


def encoded(size: tuple[int, int] = (6, 4), kind: str = 'PNG', **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A small PNG file that says it has many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    data = chunk(b'IDAT', zlib.compress(b'\0' * 10_000))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + data + chunk(b'IEND', b'')


@pytest.fixture
def folder(tmp_path: Path) -> PictureFolder:
    inside = tmp_path / 'pictures'
    inside.mkdir()
    (inside / 'a.png').write_bytes(encoded())
    (inside / 'broken.jpg').write_bytes(encoded(kind='JPEG')[:40])
    (inside / 'huge.png').write_bytes(bomb(60_000, 60_000))
    (inside / '.hidden.png').write_bytes(encoded())
    (inside / 'notes.txt').write_text('no picture')
    (tmp_path / 'secret.png').write_bytes(encoded())
    (inside / 'link.png').symlink_to(tmp_path / 'secret.png')
    return PictureFolder(inside, max_bytes=5000, max_pixels=10_000)


def test_pictures_are_listed_and_those_that_cannot_be_used_say_why(folder):
    errors = {picture.name: picture.error for picture in folder.pictures.values()}
    assert list(errors) == ['a.png', 'broken.jpg', 'huge.png', 'link.png']
    assert errors['a.png'] is None and [p.name for p in folder.usable()] == ['a.png']
    assert 'cannot be read' in errors['broken.jpg'] and 'outside of the folder' in errors['link.png']
    assert 'pixels' in errors['huge.png']
    with pytest.raises(ValueError, match='outside of the folder'):
        folder.read(next(p for p in folder.pictures.values() if p.name == 'link.png'))
    with pytest.raises(KeyError, match='reload'):
        folder['../secret.png']
    with pytest.raises(NotADirectoryError, match='is not a folder'):
        PictureFolder(folder.path / 'a.png')


@pytest.mark.parametrize(
    'name', ['../a.png', '..', '.a.png', 'a/b.png', 'a\\b.png', '/etc/x.png', 'a\0.png', '', 'x' * 200, 'C:a.png']
)
def test_names_that_lead_elsewhere_are_refused(folder, name):
    before = sorted(folder.path.parent.rglob('*'))
    with pytest.raises(ValueError, match='is no name of a picture'):
        folder.add(name, encoded())
    assert sorted(folder.path.parent.rglob('*')) == before


def test_added_pictures_get_a_free_name_and_the_suffix_of_their_format(folder):
    data = encoded(kind='JPEG')
    added = [folder.add(name, data).name for name in ('a.png', 'a.png', 'ä b.jpeg', 'x.php')]
    assert added == ['a.jpg', 'a-2.jpg', 'ä b.jpg', 'x.jpg']
    assert (folder.path / 'a-2.jpg').read_bytes() == data
    assert [p.name for p in folder.usable()] == sorted(['a.png', *added])


@pytest.mark.parametrize(
    ('data', 'error', 'message'),
    [
        (encoded((400, 300), 'BMP'), TooLargeError, 'at most 5000'),
        (bomb(60_000, 60_000), TooLargeError, 'pixels'),
        (bomb(200, 100), TooLargeError, '200 x 100 pixels, at most 0.01 million'),
        (b'<svg onload="alert(1)"/>', ValueError, 'cannot be read as a picture'),
        (encoded()[:60], ValueError, 'cannot be read as a picture'),
        (encoded((40, 40), 'JPEG')[:900], ValueError, 'damaged or truncated'),
        (b'', ValueError, 'cannot be read as a picture'),
    ],
    ids=['file', 'bomb', 'pixels', 'markup', 'png', 'jpeg', 'empty'],
)
def test_hostile_and_broken_pictures_are_refused(folder, data, error, message):
    before = sorted(folder.path.iterdir())
    with pytest.raises(error, match=message):
        folder.add('new.png', data)
    assert sorted(folder.path.iterdir()) == before


def test_the_tensor_is_that_of_mmseg_and_turned_as_viewers_turn_it(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = folder.add('turned.jpg', encoded(kind='JPEG', exif=exif))
    assert picture.size == (6, 4)
    x = folder.tensor(picture)
    assert x.shape == (1, 3, 6, 4)
    pixels = torch.from_numpy(np.array(folder.read(picture))).permute(2, 0, 1)
    preprocess = SegDataPreProcessor(mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True)
    expected = preprocess({'inputs': [pixels.flip(0)], 'data_samples': None})['inputs']
    assert torch.equal(x, expected)  # so that a trained model finds the explorer's features in the cache


def test_large_pictures_are_shown_smaller(tmp_path):
    (tmp_path / 'wide.png').write_bytes(encoded((2000, 500)))
    folder = PictureFolder(tmp_path)
    picture = folder.usable()[0]
    for side, size in ((1600, (1600, 400)), (256, (256, 64))):
        data, kind = folder.encoded(picture, side)
        assert kind == 'image/jpeg' and Image.open(io.BytesIO(data)).size == size

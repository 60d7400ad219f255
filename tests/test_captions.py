"""Tests for diffseg.captions."""

import json
from pathlib import Path

import pytest

from diffseg.captions import Captions


@pytest.fixture
def captions(tmp_path: Path) -> Captions:
    content = {'1.jpg': 'a horse', 'dog/2.jpg': 'a dog', 'cat/2.jpg': 'a cat — asleep', 'pets/cat/2.jpg': ''}
    (tmp_path / 'captions.json').write_text(json.dumps(content, ensure_ascii=False), encoding='utf-8')
    return Captions(tmp_path / 'captions.json')


@pytest.mark.parametrize(
    ('path', 'caption'),
    [
        ('1.jpg', 'a horse'),
        ('/data/images/1.jpg', 'a horse'),
        (Path('/data/dog/2.jpg'), 'a dog'),
        ('/data/cat/2.jpg', 'a cat — asleep'),
        ('/data/pets/cat/2.jpg', ''),  # the longest name
    ],
)
def test_a_caption_is_found_by_the_end_of_the_path(captions, path, caption):
    assert captions.texts[captions.row(path)] == caption


@pytest.mark.parametrize('path', ['/data/2.jpg', '/data/1.png', '/data/11.jpg', '', None])
def test_an_image_without_a_caption(captions, path):
    with pytest.raises(ValueError, match=rf'no caption for the image {str(path)!r} in .*captions\.json'):
        captions.row(path)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('', 'is not JSON'),
        ('{"1.jpg": "a', 'is not JSON'),
        ('["a horse"]', 'holds no captions; it is {"image name"'),
        ('{}', 'holds no captions'),
        ('{"1.jpg": "a", "2.jpg": ["b"]}', r"caption of '2.jpg' is \['b'\]"),
    ],
)
def test_files_that_hold_no_captions(tmp_path, content, message):
    (tmp_path / 'x.json').write_text(content)
    with pytest.raises(ValueError, match=rf'x\.json.*{message}'):
        Captions(tmp_path / 'x.json')


def test_an_absent_file(tmp_path):
    with pytest.raises(OSError, match=r'x\.json'):
        Captions(tmp_path / 'x.json')

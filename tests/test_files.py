"""Files that are whole or absent."""

import os
from pathlib import Path

import pytest

from diffseg.files import whole_file


@pytest.fixture
def umask():
    """A group that shares its files."""
    before = os.umask(0o002)
    yield
    os.umask(before)


def test_a_file_appears_as_a_whole_with_the_permissions_of_any_new_file(tmp_path: Path, umask):
    path = tmp_path / 'new/file.txt'
    for content in ('first', 'second'):
        with whole_file(path) as partial:
            partial.write_text(content)
            assert not path.exists() or path.read_text() == 'first'
        assert path.read_text() == content and path.stat().st_mode & 0o777 == 0o664
    assert os.listdir(path.parent) == ['file.txt']


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path):
    path = tmp_path / 'file.txt'
    path.write_text('before')
    with pytest.raises(KeyboardInterrupt), whole_file(path, tmp_path / 'partial') as partial:
        assert partial.parent == tmp_path / 'partial'
        partial.write_text('half')
        raise KeyboardInterrupt
    assert path.read_text() == 'before' and not list((tmp_path / 'partial').iterdir())


def test_writers_of_one_file_do_not_meet(tmp_path: Path):
    path = tmp_path / 'file.txt'
    with whole_file(path) as first, whole_file(path) as second:
        first.write_text('first')
        second.write_text('second')
    assert path.read_text() == 'first' and os.listdir(tmp_path) == ['file.txt']

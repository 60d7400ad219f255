"""Files that are whole or absent."""

import os
from pathlib import Path

import pytest

from diffseg.files import remove_abandoned, whole_file


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


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_stays(tmp_path: Path):
    with whole_file(tmp_path / 'a.txt') as abandoned, whole_file(tmp_path / 'b.txt') as written:
        for path in (abandoned, written, tmp_path / '.c.txt'):
            path.write_text('half')
        for path in (abandoned, tmp_path / '.c.txt'):
            os.utime(path, (0, 0))
        remove_abandoned(tmp_path.iterdir())
        assert not abandoned.exists() and written.exists() and (tmp_path / '.c.txt').exists()
        abandoned.touch()

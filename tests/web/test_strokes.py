"""Strokes and classes: kept through a crash, drawn in order."""

import json

import numpy as np
import pytest

from diffseg.web.strokes import UNLABELLED, Annotations, Class

BACKGROUND, LEAF = Class('background', '#767f89'), Class('leaf <b>', '#1f9d55')


@pytest.fixture
def annotations(tmp_path):
    made = Annotations(tmp_path)
    made.set_classes([BACKGROUND, LEAF], [None, None])
    return made


def test_every_change_is_on_disk_when_it_returns(annotations, tmp_path):
    first = annotations.add('a.png', 1, 2.5, [[1, 2], [3.5, 4]])
    second = annotations.add('b.png', None, 1, [[0, 0]])
    again = Annotations(tmp_path)  # as after a crash
    assert again.strokes == [first, second] and again.classes == [BACKGROUND, LEAF]
    annotations.remove(first.id)
    third = again_id = Annotations(tmp_path).add('a.png', 0, 1, [[1, 1]]).id
    assert third == again_id > second.id  # no number is used twice
    with pytest.raises(KeyError, match='is gone'):
        annotations.remove(99)


def test_a_stroke_that_cannot_be_saved_is_not_there(annotations, tmp_path, monkeypatch):
    before = (tmp_path / 'strokes.json').read_bytes()

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('os.replace', full)
    with pytest.raises(OSError, match='No space'):
        annotations.add('a.png', 1, 2, [[1, 2]])
    assert annotations.strokes == [] and (tmp_path / 'strokes.json').read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ['strokes.json']


def test_strokes_lie_over_each_other_and_over_imported_labels(annotations):
    assert (annotations.raster('a.png', (10, 12)) == UNLABELLED).all()
    base = np.full((10, 12), UNLABELLED, np.uint8)
    base[:, :3] = 1
    annotations.replace_all([BACKGROUND, LEAF], [], {'a.png': base})
    first = annotations.add('a.png', 0, 1.4, [[0, 5], [11, 5]])
    annotations.add('a.png', None, 0, [[6, 5]])
    labels = annotations.raster('a.png', (10, 12))
    assert labels[0].tolist() == [1, 1, 1] + [UNLABELLED] * 9
    assert labels[5, :6].tolist() == [0] * 6 and labels[5, 6] == UNLABELLED and labels[5, 7] == 0
    numbers = annotations.pixels('a.png', (10, 12))
    assert numbers[5, 0] == first.id and numbers[5, 6] == first.id + 1 and numbers[0, 0] == 0
    assert annotations.painted() == ['a.png']


def test_classes_that_move_take_their_strokes_and_labels_along(annotations, tmp_path):
    annotations.replace_all([BACKGROUND, LEAF], [], {'a.png': np.array([[0, 1, UNLABELLED]], np.uint8)})
    annotations.add('a.png', 0, 0, [[0, 0]])
    kept = annotations.add('a.png', 1, 0, [[1, 0]])
    annotations.set_classes([Class('blade', '#000000'), Class('new', '#ffffff')], [1, None])
    assert [(s.id, s.label) for s in annotations.strokes] == [(kept.id, 0)]
    assert annotations.base('a.png', (1, 3)).tolist() == [[UNLABELLED, 0, UNLABELLED]]
    assert Annotations(tmp_path).classes[0].rgb == (0, 0, 0)


@pytest.mark.parametrize(
    ('classes', 'kept', 'message'),
    [
        ([LEAF, LEAF], [0, 1], 'a name of its own'),
        ([LEAF], [5], 'changed elsewhere'),
        ([LEAF, BACKGROUND], [0, 0], 'changed elsewhere'),
        ([Class(str(i), '#000000') for i in range(65)], [None] * 65, 'at most 64'),
    ],
)
def test_wrong_classes_are_refused(annotations, classes, kept, message):
    with pytest.raises(ValueError, match=message):
        annotations.set_classes(classes, kept)
    assert annotations.classes == [BACKGROUND, LEAF]
    with pytest.raises(ValueError, match='no class 2'):
        annotations.add('a.png', 2, 1, [[0, 0]])


@pytest.mark.parametrize(
    ('name', 'colour'), [('', '#000000'), (' ', '#000000'), ('x' * 81, '#000000'), ('{{ a }}', '#000000'), ('a', 'red')]
)
def test_names_and_colours_that_would_break_a_config_are_refused(name, colour):
    with pytest.raises(ValueError, match='is no '):
        Class(name, colour)


def test_a_damaged_file_is_neither_read_nor_lost(annotations, tmp_path):
    path = tmp_path / 'strokes.json'
    for text in ('{"classes": [', json.dumps({'classes': [{'name': 'x'}], 'strokes': []})):
        path.write_text(text)
        with pytest.raises(ValueError, match='is damaged'):
            Annotations(tmp_path)
        assert path.read_text() == text

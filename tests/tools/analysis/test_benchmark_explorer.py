"""The explorer's benchmark prints a row for everything that it measures."""

import shutil

import pytest

pytest.importorskip('playwright', reason="Playwright is missing: pip install '.[dev]'")


@pytest.mark.skipif(shutil.which('chromium') is None, reason='there is no Chromium: apt-get install chromium')
def test_small_sizes(load_tool, capsys):
    sizes = '--pictures 2 --cells 4 --channels 8 --moves 3 --fits 3 --listed 5 --frames 12'
    browser = shutil.which('chromium')
    assert load_tool('analysis/benchmark_explorer').main([*sizes.split(), '--browser', browser]) == 0
    rows = [line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    assert [row[0] for row in rows[1:]] == [
        'heat maps, 2 pictures of 4 x 4 x 8',
        'products alone, 2 pictures of 4 x 4 x 8',
        'classifier of 12 strokes and scores of all pictures',
        'frames at rest',
        'frames while 5 pictures are scrolled',
    ]
    for row in rows[1:]:
        number, median, high, longest = map(float, row[1:])
        assert number >= 3 and 0 <= median <= high <= longest
    assert float(rows[1][2]) > 0 and float(rows[4][4]) > 5

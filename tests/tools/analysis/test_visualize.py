"""The grid of principal components: a row for each image, a column for each layer and timestep."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('analysis/visualize')


@pytest.fixture
def run(tool, tiny_pipeline, tmp_path):
    generator = np.random.default_rng(0)
    for name, size in (('b.png', (64, 64)), ('a.png', (64, 96))):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / 'notes.txt').write_text('')

    def run(*options, images=(tmp_path,)):
        fixed = f'--model {tiny_pipeline} --out {tmp_path}/sub/pca.png --device cpu --cell 48'
        return tool.main([*map(str, images), *fixed.split(), *options])

    return run


def picture(tmp_path):
    return np.asarray(Image.open(tmp_path / 'sub' / 'pca.png'))


def test_grid(run, tool, tmp_path, monkeypatch, capsys):
    seen = {}

    def grid(rows, row_names, column_names, *args):
        seen.update(rows=rows, row_names=row_names, column_names=column_names)
        return original(rows, row_names, column_names, *args)

    original = tool.grid
    monkeypatch.setattr(tool, 'grid', grid)
    assert run('--layers', 'practical', 'mid-vit-out', '--timesteps', '50', '300') == 0
    assert seen['row_names'] == ['a.png', 'b.png']
    assert seen['column_names'][0] == 'image' and seen['column_names'][-1] == 'mid-vit-out t=300'
    assert len(seen['column_names']) == 1 + 5 * 2
    assert seen['rows'][0][1].shape == (3, 2, 3) and seen['rows'][1][1].shape == (3, 2, 2)  # stride 32
    assert '2 images x 10 maps' in capsys.readouterr().out
    assert picture(tmp_path).std() > 20


def test_joint_and_separate_differ_and_runs_repeat(run, tmp_path):
    options = '--layers', 'up-level2-repeat0-res-out', '--timesteps', '50'
    pictures = []
    for extra in ((), (), ('--separate',), ('--smooth',), ('--size', '64')):
        assert run(*options, *extra) == 0
        pictures.append(picture(tmp_path))
    assert np.array_equal(pictures[0], pictures[1])
    assert all(each.shape != pictures[0].shape or (each != pictures[0]).any() for each in pictures[2:])


def test_errors(run, tmp_path, capsys):
    assert run('--layers', 'practical', '--timesteps', '50', images=[tmp_path / 'notes.txt']) == 2
    assert 'notes.txt: cannot be read' in capsys.readouterr().err
    assert run('--layers', 'up-level1-repeat1-vit-block0-crossq', '--timesteps', '50') == 2
    assert 'cross-q' in capsys.readouterr().err

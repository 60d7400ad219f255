"""The homography between two images: printed and drawn."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffseg.visualization import CORRECT

CONFIG = Path(__file__).resolve().parents[3] / 'configs/hpatches/toy/best-layer_t0.py'


@pytest.fixture(scope='module')
def folder(load_tool: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One toy sequence of each kind, 64 x 96 pixels."""
    root = tmp_path_factory.mktemp('data')
    load_tool('toy/make_hpatches').main([str(root), '--sequences', '1', '--size', '64', '96'])
    return root / 'HPatches-toy'


@pytest.fixture
def run(load_tool: Callable, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """`run(source, target, *options)`: what is printed, or the error."""
    main = load_tool('apply/homography').main

    def run(source: str, target: str, *options: object, config: Path = CONFIG, status: int = 0) -> str:
        paths = [str(config), str(folder / source), str(folder / target)]
        assert main([*paths, '--out', str(tmp_path / 'out/h.png'), '--device', 'cpu', *map(str, options)]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


@pytest.mark.parametrize('method', [(), ('--method', 'lmeds'), ('--method', 'magsac')])
def test_a_known_homography_is_estimated_and_drawn(run, folder, tmp_path, method):
    printed = run('v_scene00/1.ppm', 'v_scene00/2.ppm', '--truth', folder / 'v_scene00/H_1_2', *method)
    lines = printed.splitlines()
    assert 'matches of' in lines[0] and 'inliers' in lines[0]
    matrix = np.array([line.split() for line in lines[1:4]], float)
    np.testing.assert_allclose(matrix, np.loadtxt(folder / 'v_scene00/H_1_2'), atol=2)
    assert lines[4].startswith('corner error ') and float(lines[4].split()[2]) < 2
    picture = np.asarray(Image.open(tmp_path / 'out/h.png').convert('RGB')).astype(int)
    assert (np.abs(picture - CORRECT).max(axis=2) < 24).any()


def test_given_points(run, tmp_path):
    points = tmp_path / 'points.kp'
    points.write_text('\n'.join(f'{x} {y}' for x in range(5, 95, 10) for y in range(5, 60, 10)))
    printed = run('i_scene00/1.ppm', 'i_scene00/1.ppm', '--keypoints', points, points)
    assert printed.startswith('54 matches of 54 and 54 points, 54 inliers')
    matrix = np.array([line.split() for line in printed.splitlines()[1:4]], float)
    np.testing.assert_allclose(matrix, np.eye(3), atol=1e-4)


def test_errors(run, folder, tmp_path):
    pair = 'v_scene00/1.ppm', 'v_scene00/2.ppm'
    few = tmp_path / 'few.kp'
    few.write_text('1 2\n30 40\n50 20\n')
    assert '3 matches support no homography' in run(*pair[:1] * 2, '--keypoints', few, few, status=2)
    assert 'cannot be read as points' in run(*pair, '--keypoints', few, tmp_path / 'missing.kp', status=2)
    (tmp_path / 'H').write_text('1 0 0\n1 0 0\n0 0 1\n')
    assert 'is singular' in run(*pair, '--truth', tmp_path / 'H', status=2)
    assert 'missing.ppm' in run(pair[0], 'missing.ppm', status=2)
    other = CONFIG.parents[2] / 'correspondence/sd21-t261_dift_1xb1-zero-shot_spair-768x768.py'
    assert 'its model is no SparseMatcher' in run(*pair, config=other, status=2)

"""Options of an extractor, compared in one run."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def run(load_tool: Callable, tiny_pipeline, capsys) -> Callable[..., list[list[str]]]:
    """Cells of the rows of the table."""
    main = load_tool('analysis/compare_options').main

    def run(*options: object) -> list[list[str]]:
        fixed = [
            '--model',
            tiny_pipeline,
            '--size',
            64,
            '--layers',
            'dift-1',
            'dhf-2-0',
            '--device',
            'cpu',
            '--repeat',
            1,
        ]
        assert main([*map(str, [*fixed, *options])]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(str(tiny_pipeline))
        return [re.split(r' ?[|] ?', line)[1:-1] for line in lines[4:]]

    return run


@pytest.mark.parametrize('weights', [(), ('--random',)])
def test_the_first_options_agree_with_themselves_and_fewer_bits_less(run, weights):
    exact, rounded = run('--options', 'dtype=float32', 'dtype=bfloat16,memory_format=channels_last', *weights)
    assert exact[:2] == ['dtype=float32', 'float32'] and exact[6:8] == ['1.00000', '1.00000']
    assert exact[3] == exact[5] == '1.00'
    assert rounded[:2] == ['dtype=bfloat16,memory_format=channels_last', 'bfloat16']
    assert 0.9 < float(rounded[6]) <= float(rounded[7]) < 1 and float(rounded[2]) > 0
    assert rounded[8] in ('up-level1-upsampler-out', 'up-level2-repeat0-res-increment')


def test_images_and_other_weights(run, tiny_taesd, tmp_path):
    for name in 'ab':
        pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f'{name}.png')
    rows = run(tmp_path, '--count', 2, '--options', 'vae=None', f'vae={tiny_taesd}', 'ensemble=2')
    assert [float(row[7]) < 0.9999 for row in rows] == [False, True, True]


def test_errors(load_tool, tiny_pipeline, capsys):
    main = load_tool('analysis/compare_options').main
    fixed = ['--model', str(tiny_pipeline), '--options', 'dtype=float32']
    for given, message in (
        ('bfloat16', "'bfloat16' in --options is not NAME=VALUE"),
        ('dtype=wide', "unknown dtype 'wide'"),
    ):
        assert main([*fixed, given]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(fixed)

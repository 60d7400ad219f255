"""Hours and bytes of many images."""

import re
from collections.abc import Callable

import pytest

from diffseg.costs import Setting, cost


@pytest.fixture
def run(load_tool: Callable, tiny_pipeline, capsys) -> Callable[..., list[str]]:
    """Cells of the row of a setting of the tiny pipeline."""
    main = load_tool('analysis/estimate').main

    def run(*options: object) -> list[str]:
        setting = ['--model', tiny_pipeline, '--size', 64, '--layers', 'dift-1', 'dhf-2-0', '--timesteps', 50, 261]
        assert main([*map(str, [*setting, '--device', 'cpu', *options])]) == 0
        (line,) = capsys.readouterr().out.splitlines()[4:]
        return re.split(r' ?[|] ?', line)[1:-1]

    return run


def test_hours_are_operations_over_the_rate(run, tiny_pipeline):
    one = cost(Setting(tiny_pipeline, 64, ('dift-1', 'dhf-2-0'), (50, 261)))
    rate = one.flop / 1e12  # an image per second
    row = run('--rate', rate, '--images', 30, 90, 36_000, 3_600_000, '--save-dtype', 'float32')
    assert row[1:4] == ['64', '2', '1'] and float(row[4]) == pytest.approx(rate, rel=1e-2)
    assert [cell.split(', ')[0] for cell in row[7:]] == ['30 s', '1.5 min', '10 h', '1,000 h']
    for dtype, itemsize in (('float32', 4), ('float16', 2)):
        row = run('--rate', rate, '--images', 1_000_000, '--save-dtype', dtype)
        assert row[7].endswith(f', {itemsize * one.values / 1e3:.3g} GB')


def test_a_measured_rate(run):
    row = run('--measure', '--images', 1000, '--dtype', 'bfloat16', '--memory-format', 'channels_last')
    assert float(row[5]) > 0


def test_data_sets(run):
    assert len(run('--rate', 1)) == 7 + 4


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--rate', '0'], '--rate is 0; it is a number of TFLOP per second above 0'),
        (['--measure', '--rate', '1'], 'not allowed with argument'),
        (
            ['--rate', '1', '--settings', 'SDXL, practical layers', '--model', 'sd15'],
            'give either --settings or --model',
        ),
    ],
)
def test_wrong_arguments(load_tool, capsys, options, message):
    with pytest.raises(SystemExit):
        load_tool('analysis/estimate').main(options)
    assert message in capsys.readouterr().err


def test_errors(load_tool, capsys):
    assert load_tool('analysis/estimate').main(['--rate', '1', '--model', 'sd15', '--layers', 'none']) == 2
    assert 'unknown' in capsys.readouterr().err

"""Parameters and operations of necks, against a count by hand."""

from pathlib import Path

CONFIGS = Path(__file__).parents[3] / 'configs/correspondence/toy-necks'


def test_costs(load_tool, capsys):
    load_tool('analysis/describe_configs')  # which a script finds beside itself
    tool = load_tool('analysis/neck_costs')
    paths = [CONFIGS / f'twelve-layers_clean_{kind}.py' for kind in ('concat', 'zero-shot')]
    assert tool.main([*map(str, paths), '--size', '64']) == 0
    parameters = 912 * 64 * 9
    operations = 2 * parameters * 16 * 16
    assert capsys.readouterr().out.splitlines()[2:] == [
        f'| `twelve-layers_clean_concat` | {parameters:,} | {operations / 1e6:.1f} |',
        '| `twelve-layers_clean_zero-shot` | 0 | 0.0 |',
    ]
    assert tool.main(['missing.py', '--size', '64']) == 2

"""tools/analysis/describe_configs.py, and the table that it writes."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / 'configs/segmentation'
CONFIGS = sorted(FOLDER.glob('*.py'))


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('analysis/describe_configs')


def test_the_readme_has_every_config_in_order(tool):
    lines = tool.read_lines((FOLDER / 'README.md').read_text())
    assert list(lines) == [path.stem for path in CONFIGS if 'mask2former' not in path.stem]


def test_every_published_figure_belongs_to_a_config(tool):
    figures = {path.stem: tool.published(path.stem) for path in CONFIGS}
    assert sum(map(bool, figures.values())) == len(tool.PUBLISHED)
    assert all(figure for stem, figure in figures.items() if '-published_' in stem)
    assert figures['sdxl-t50_concat-upernet-published_1xb2-80k_cityscapes-1024x1024'] == '74.47 (arXiv 2410.03558)'
    assert figures['sdxl-t50_agg-upernet_1xb2-80k_cityscapes-1024x1024'] == ''


@pytest.mark.parametrize(
    'stem',
    [  # one for each kind of backbone; all of them take minutes
        'sd15-t50_agg-upernet_1xb2-80k_ade20k-512x512',
        'sd15-lora-t50_agg-upernet_1xb2-80k_ade20k-512x512',
        'sd15-vpd-t1_fpn_8xb2-80k_ade20k-512x512',
        'sd15-metaprompts-frozen_upernet_8xb1-80k_ade20k-512x512',
        'sd15+dinov2-b-t50_agg-upernet_1xb2-80k_ade20k-512x512',
    ],
)
def test_the_readme_says_what_the_tool_computes(tool, stem):
    lines = tool.read_lines((FOLDER / 'README.md').read_text())
    assert lines[stem] == tool.line(tool.describe(FOLDER / f'{stem}.py'))


def test_writing_replaces_lines_and_keeps_the_others(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, 'FOLDER', tmp_path)
    monkeypatch.setattr(tool, 'describe', lambda path: [f'[{path.stem}]({path.name})', 'new'])
    for name in 'abc':
        (tmp_path / f'{name}.py').touch()
    old = '\n'.join(f'| [{name}]({name}.py) | old |' for name in 'abz')
    (tmp_path / 'README.md').write_text(f'before\n{tool.BEGIN}\n{old}\n{tool.END}\nafter\n')
    assert tool.main([str(tmp_path / 'b.py'), str(tmp_path / 'c.py'), '--write']) == 0
    text = (tmp_path / 'README.md').read_text()
    assert list(tool.read_lines(text)) == ['a', 'b', 'c']
    assert [line.split(' | ')[1] for line in tool.read_lines(text).values()] == ['old |', 'new |', 'new |']
    assert text.startswith('before\n') and text.endswith('after\n')

    assert tool.main([str(tmp_path / 'a.py')]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == '| [a](a.py) | new |'


def test_a_config_that_needs_what_is_not_installed_is_left_out(tool, tmp_path, monkeypatch, capsys):
    (tmp_path / 'config.py').write_text("custom_imports = dict(imports=['no_such_package'])")
    assert tool.main([str(tmp_path / 'config.py')]) == 1
    assert 'config is left out: Failed to import no_such_package' in capsys.readouterr().err

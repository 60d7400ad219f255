"""`python -m diffseg` runs scripts of installed packages after importing diffseg."""

import sys

import pytest

from diffseg import __main__ as entry


@pytest.fixture(autouse=True)
def _arguments(monkeypatch):
    monkeypatch.setattr(sys, 'argv', [])
    monkeypatch.setattr(sys, 'path', ['', *sys.path])


def test_a_script_of_mmseg_that_imports_it_first_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it leaves a file
    (tmp_path / 'config.py').write_text('a = 1')
    entry.main(['mmseg', 'print_config', str(tmp_path / 'config.py'), '--cfg-options', 'b=2'])
    assert 'a=1\nb=2' in capsys.readouterr().out.replace(' ', '')


def test_a_script_outside_of_the_package_runs(tmp_path, capsys):
    (tmp_path / 'demo.py').write_text('import helper, sys; print(__name__, helper.VALUE, sys.argv[1:])')
    (tmp_path / 'helper.py').write_text('VALUE = 3')
    entry.main(['mmseg', str(tmp_path / 'demo.py'), '--x'])
    assert capsys.readouterr().out == "__main__ 3 ['--x']\n"


@pytest.mark.parametrize(
    'argv, message',
    [
        ([], 'python -m diffseg PACKAGE SCRIPT'),
        (['mmseg', 'nothing'], 'mmseg has no script nothing; give a path, or one of .*print_config'),
        (['mmseg', 'nothing.py'], 'mmseg has no script nothing.py'),
        (['no_such_package', 'train'], 'no_such_package is not installed, or carries no scripts'),
    ],
)
def test_errors(argv, message):
    with pytest.raises(SystemExit, match=message):
        entry.main(argv)

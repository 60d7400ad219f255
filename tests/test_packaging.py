"""What a wheel and a source distribution hold, and that building them leaves the source tree as it was."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import diffseg

ROOT = Path(__file__).parents[1]
ROOT_FILES = (
    'CHANGELOG.md CITATION.cff CONTRIBUTING.md LICENSE MANIFEST.in Makefile README.md SECURITY.md constraints.txt '
    'pyproject.toml setup.py'
).split()
EXTRAS = ('mm', 'demo', 'dev', 'web', 'docs')  # which the Makefile installs
IGNORED = shutil.ignore_patterns('__pycache__', 'output', '_build', 'api')


def run(*command, cwd: Path) -> None:
    subprocess.run([sys.executable, *command], cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def files(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}
    return {name for name in found if not name.startswith(('.', 'diffseg.egg-info/'))}


def copy_source(folder: Path) -> Path:
    """A copy of what the repository holds."""
    for name in ROOT_FILES:
        shutil.copy(ROOT / name, folder)
    for name in ('configs', 'demo', 'diffseg', 'docs', 'tests', 'tools'):
        shutil.copytree(ROOT / name, folder / name, ignore=IGNORED)
    return folder


def build_wheel(source: Path, out: Path) -> zipfile.ZipFile:
    run('-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '--wheel-dir', out, source, cwd=source)
    return zipfile.ZipFile(next(out.glob('diffseg-*.whl')))


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> Path:
    return copy_source(tmp_path_factory.mktemp('source'))


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory) -> zipfile.ZipFile:
    return build_wheel(source, tmp_path_factory.mktemp('wheel'))


def test_wheel_holds_the_package_and_what_mim_looks_for(wheel):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'diffseg').rglob('*.py')}
    configs = {f'diffseg/.mim/{path.relative_to(ROOT)}' for path in (ROOT / 'configs').rglob('*.[pm][yd]')}
    tools = {f'diffseg/.mim/{path.relative_to(ROOT)}' for path in (ROOT / 'tools').rglob('*.py')}
    assert len(configs) >= 7 and 'diffseg/.mim/tools/train.py' in tools
    page = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'diffseg/web/static').iterdir()}
    assert {'diffseg/web/static/index.html', 'diffseg/web/static/main.js'} <= page
    held = {name for name in wheel.namelist() if '.dist-info/' not in name}
    index = {name for name in held if name.endswith(('model-index.yml', 'metafile.yml'))}
    assert held - index == modules | page | configs | {path for path in tools if '/tools/toy/' not in path}


def test_every_config_of_the_wheel_is_in_the_model_index(wheel):
    def read(name):
        return yaml.safe_load(wheel.read(f'diffseg/.mim/{name}'))

    models = [model for metafile in read('model-index.yml')['Import'] for model in read(metafile)['Models']]
    paths = [path.relative_to(ROOT) for path in (ROOT / 'configs').rglob('*.py') if path.name[0] != '_']
    expected = {path.as_posix() for path in paths if '_base_' not in path.parts}
    assert {model['Config'] for model in models} == expected
    assert len({model['Name'] for model in models}) == len(models) == len(expected) > 100


def test_configs_of_the_wheel_are_inherited(wheel, tmp_path):
    wheel.extractall(tmp_path / 'site')
    base = 'segmentation/sd15-t50_agg-upernet_1xb2-80k_ade20k-512x512.py'
    (tmp_path / 'config.py').write_text(f"_base_ = 'diffseg::{base}'")
    code = 'import diffseg, sys; from mmengine.config import Config; print(Config.fromfile(sys.argv[1]).model.backbone)'
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path / 'site')}
    command = [sys.executable, '-c', code, tmp_path / 'config.py']
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "'model': 'sd15'" in done.stdout, done.stderr


def test_building_leaves_the_source_as_it_was(source, wheel, tmp_path):
    assert files(source) == files(copy_source(tmp_path))


def test_source_distribution_is_complete(source, wheel, tmp_path):
    run('-c', f'from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})', cwd=source)
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as archive:
        archive.extractall(tmp_path, filter='data')
    unpacked = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert files(source) - files(unpacked) == set()
    assert build_wheel(unpacked, tmp_path).namelist() == wheel.namelist()


def test_constraints_pin_every_requirement(wheel):
    pins = dict(re.findall(r'^([\w.-]+)==(.+)$', (ROOT / 'constraints.txt').read_text(), re.M))
    pins = {name.lower().replace('_', '-'): Version(version) for name, version in pins.items()}
    metadata = message_from_bytes(wheel.read(next(name for name in wheel.namelist() if name.endswith('METADATA'))))
    installed = [
        requirement
        for requirement in map(Requirement, metadata.get_all('Requires-Dist'))
        if requirement.marker is None or any(requirement.marker.evaluate({'extra': e}) for e in EXTRAS)
    ]
    assert len(installed) > 10
    assert [str(r) for r in installed if r.name not in pins or pins[r.name] not in r.specifier] == []
    hooks = (ROOT / '.pre-commit-config.yaml').read_text()
    assert f'rev: v{pins["ruff"]} ' in hooks


def test_the_citation_has_the_version():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == diffseg.__version__ and citation['cff-version'] == '1.2.0'

"""What README and documentation name exists: files, links, commands and their options."""

import argparse
import itertools
import re
from functools import cache
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in [*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md'), *(ROOT / 'configs').rglob('*.md')]
    if not {'_build', 'api'} & set(path.relative_to(ROOT).parts)
)
LINK = re.compile(r'\]\(([^)\s]+)\)')
TOOL = re.compile(r'(?:python|\$P) (?P<script>(?:tools|demo)/[\w/]+\.py)(?P<arguments>(?:\\\n|[^\n`;#&|])*)')
PLACEHOLDER = re.compile(r'[A-Z]{3,}|\.\.\.|[$<]')
FILE = re.compile(r'(?<![\w/.])((?:configs|demo|docs|tests|tools|diffseg)/[\w.+/-]*+)(?![*[{$])')
MAKE = re.compile(r'(?:^|`)make (\w+)', re.M)


class Parsed(Exception):
    """Carries the parser of a tool, in place of the work that the tool would do."""


@cache
def options(script: str) -> set[str]:
    """Options of a tool, those of its subcommands included."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Parsed(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str((ROOT / script).parent))
        main = run_path(str(ROOT / script))['main']
        patch.setattr(argparse.ArgumentParser, 'parse_known_args', stop)
        try:
            main([])
        except Parsed as caught:
            return set(option_strings(caught.args[0]))
    raise AssertionError(f'{script} parses no arguments')


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    strings = []
    for action in parser._actions:
        strings += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            strings += [string for choice in action.choices.values() for string in option_strings(choice)]
    return strings


def braces(text: str) -> list[str]:
    """A shell's expansion of {a,b}."""
    parts = [part[1:-1].split(',') if part[:1] == '{' else [part] for part in re.split(r'(\{[^}]*\})', text)]
    return [''.join(choice) for choice in itertools.product(*parts)]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Scripts of the project that a page calls, with their arguments."""
    calls = [(call['script'], call['arguments'].replace('\\\n', ' ')) for call in TOOL.finditer(text)]
    return [(script, re.split(r'\s+', arguments.strip())) for script, arguments in calls]


def test_pages_and_commands_are_seen():
    calls = [command for page in PAGES for command in commands(page.read_text())]
    assert len(PAGES) > 25 and len(calls) > 60
    assert ('tools/toy/make_data.py', ['data', '--test', '100']) in calls
    assert braces('a{1,2}b{c,d}') == ['a1bc', 'a1bd', 'a2bc', 'a2bd']


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    links = [link for link in LINK.findall(page.read_text()) if not re.match(r'https?:|mailto:|#', link)]
    exists = Path.exists if page.parent == ROOT or 'configs' in page.parts else Path.is_file  # pages link to no folders
    assert [link for link in links if not exists(page.parent / link.partition('#')[0])] == []


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_exist_with_their_options(page):
    wrong = []
    for script, arguments in commands(page.read_text()):
        if not (ROOT / script).is_file():
            wrong.append(script)
            continue
        given = {word.partition('=')[0].strip('\'")') for word in arguments if word.startswith('--')}
        wrong += [f'{script} {option}' for option in given - options(script)]
        paths = [path for word in arguments for path in braces(word) if re.match(r'(configs|demo)/', path)]
        for path in paths:
            if not PLACEHOLDER.search(path) and not path.startswith('demo/output') and not [*ROOT.glob(path)]:
                wrong.append(f'{script} {path}')
    assert wrong == []


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_targets_of_make_exist(page):
    targets = re.findall(r'^(\w+):', (ROOT / 'Makefile').read_text(), re.M)
    assert set(MAKE.findall(page.read_text())) <= set(targets)


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_are_named_exist(page):
    names = [name.rstrip('.') for name in FILE.findall(page.read_text())]
    missing = [name for name in names if not PLACEHOLDER.search(name) and not (ROOT / name).exists()]
    assert [name for name in missing if not name.startswith(('demo/output', 'docs/_build'))] == []


def test_the_readme_is_a_page():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 200


def code(page: str, first: str) -> str:
    """The Python block of a page that begins like this."""
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / page).read_text(), re.S)
    return next(block for block in blocks if block.startswith(first))


@pytest.fixture
def drawn(tmp_path, monkeypatch) -> Path:
    """A working directory with some toy pictures, from which `demo` can be read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'demo').symlink_to(ROOT / 'demo')
    call('tools/toy/make_data.py', 'data', '--mmseg', '--train', '4', '--test', '1')
    return tmp_path


def call(script: str, *arguments: str) -> object:
    return run_path(str(ROOT / script))['main'](list(arguments))


def test_ten_lines_of_python(drawn):
    next((drawn / 'data').rglob('*.png')).rename('horse.png')
    exec(code('README.md', 'from diffseg'), {})
    pictures = [Image.open(path) for path in drawn.glob('up-*.png')]
    assert [picture.size for picture in pictures] == [(256, 256)] * 2
    assert all(np.asarray(picture).std() > 10 for picture in pictures)


def test_the_walk_from_pictures_to_masks(drawn):
    Path('my_config.py').write_text(code('docs/your-own-data.md', '_base_'))
    short = ('train_cfg.max_iters=2', 'default_hooks.checkpoint.interval=2')
    call('tools/train.py', 'my_config.py', '--cfg-options', *short)
    metrics = call('tools/test.py', 'my_config.py', 'work_dirs/my_config/iter_2.pth', '--out', 'masks')
    assert 0 < metrics['mIoU'] < 100
    assert call('tools/convert/publish.py', 'work_dirs/my_config/iter_2.pth', 'published/my-head') == 0
    picture = next(Path('data/toy-mmseg/images/test').iterdir())
    snippet = code('docs/your-own-data.md', 'import diffseg').replace('dog_00003.png', picture.name)
    names: dict = {}
    exec(snippet, names)
    assert names['mask'].shape == (64, 64) and names['mask'].max() < len(names['segmentor'].classes)


def test_masks_of_colours_become_indices(drawn):
    folder = Path('data/mine/labels')
    folder.mkdir(parents=True)
    colours = np.array([[[0, 0, 0], [214, 39, 40], [1, 2, 3]]], dtype=np.uint8)
    Image.fromarray(colours).save(folder / 'cow.png')
    exec(code('docs/your-own-data.md', 'from pathlib'), {})
    assert np.asarray(Image.open(folder / 'cow.png')).tolist() == [[0, 1, 255]]

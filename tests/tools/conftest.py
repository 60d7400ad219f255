"""Tools are scripts and in no package: tests import them by path."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / 'tools'


@pytest.fixture(scope='session')
def load_tool() -> Iterator[Callable[[str], ModuleType]]:
    """`load_tool('apply/match')` is the module tools/apply/match.py, imported anew."""
    with pytest.MonkeyPatch.context() as patch:

        def load(name: str) -> ModuleType:
            path = TOOLS / f'{name}.py'
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, path.stem, module)  # where dataclasses look their module up
            spec.loader.exec_module(module)
            return module

        yield load

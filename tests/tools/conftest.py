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
    """`load_tool(name)` is the module tools/NAME.py, imported anew."""
    with pytest.MonkeyPatch.context() as patch:

        def load(name: str) -> ModuleType:
            spec = importlib.util.spec_from_file_location(name, TOOLS / f'{name}.py')
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, module)  # where dataclasses look their module up
            spec.loader.exec_module(module)
            return module

        yield load

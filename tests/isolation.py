"""What a test leaves behind in global state, undone, so that no other test depends on it."""

import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import mmengine.registry
import mmseg.registry
import numpy as np
import torch
from mmengine.registry import Registry
from mmengine.utils import ManagerMixin

import diffseg  # noqa: F401  fills gaps of the mm packages, registers its parts

THREADS, SEED = 1, 0


@contextmanager
def isolated() -> Iterator[None]:
    """Begin with fixed seeds and no global instance of mmengine's, and restore what was changed in the end.

    That is: mmengine's global instances (loggers with their handlers, message hubs, visualizers, scopes), handlers and
    levels of Python's loggers, registries, environment variables, and torch's default type and determinism.
    """
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    random.seed(SEED)
    clear_instances()
    environment, dtype = dict(os.environ), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    with loggers_restored(), registries_restored():
        yield
    clear_instances()
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    if os.environ != environment:
        os.environ.clear()
        os.environ.update(environment)


def clear_instances() -> None:
    """Forget mmengine's global instances and close the log files among them.

    A handler that stays would write into the captured, by then closed, output of the test that made it.
    """
    for cls in descendants(ManagerMixin):
        for instance in cls._instance_dict.values():
            for handler in getattr(instance, 'handlers', []):
                handler.close()
        cls._instance_dict.clear()


@contextmanager
def loggers_restored() -> Iterator[None]:
    """Restore handlers and levels of Python's loggers; close the handlers that were added."""
    before = {logger: (logger.level, logger.propagate, logger.handlers[:]) for logger in python_loggers()}
    yield
    for logger in python_loggers():
        level, propagate, handlers = before.get(logger, (logging.NOTSET, True, []))
        for handler in logger.handlers:
            if handler not in handlers:
                handler.close()
        if (logger.level, logger.propagate, logger.handlers) != (level, propagate, handlers):
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers


@contextmanager
def registries_restored() -> Iterator[None]:
    """Restore mmengine's registries and their children, except for classes of modules imported meanwhile."""
    modules = set(sys.modules)
    before = {id(registry): dict(registry._module_dict) for registry in registries()}
    yield
    for registry in registries():
        known, now = before.get(id(registry), {}), registry._module_dict
        for name in [name for name, cls in now.items() if known.get(name) is not cls and cls.__module__ in modules]:
            del now[name]
        now.update(known)


def descendants(cls: type) -> Iterator[type]:
    yield cls
    for child in type.__subclasses__(cls):
        yield from descendants(child)


def python_loggers() -> list[logging.Logger]:
    managed = logging.root.manager.loggerDict.values()
    return [logging.root, *(logger for logger in managed if isinstance(logger, logging.Logger))]


def registries() -> list[Registry]:
    return [x for module in (mmengine.registry, mmseg.registry) for x in vars(module).values() if type(x) is Registry]


def import_registered() -> None:
    """Import what registries would import in the first test that looks something up in them."""
    for registry in registries():
        registry.import_from_location()

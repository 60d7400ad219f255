"""Diffusion model activations as features for mmsegmentation.

Importing the package fills the gaps that stop the installed mm packages from working with the installed torch
(`diffseg.compat`), and tells mmseg's registries where the package's parts are (`diffseg.registration`), which they
import when something is first looked up. Without mmengine, mmcv or mmseg, `diffseg.diffusion` can be used.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

__version__ = '0.1.0'

LAZY = {'DiffusionSegmentor': 'diffseg.pretrained'}  # imported when they are first used

if all(find_spec(package) is not None for package in ('mmengine', 'mmcv', 'mmseg')):
    from diffseg import compat, registration

    compat.apply()
    registration.apply()


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(LAZY[name]), name)

"""Diffusion model activations as features for mmsegmentation.

Importing the package fills the gaps that stop the installed mm packages from working with the installed torch
(`diffseg.compat`), then registers its parts. Where mmengine is not installed, only `diffseg.diffusion` can be used.
"""

from importlib.util import find_spec

__version__ = '0.1.0'

if find_spec('mmengine') is not None:
    from diffseg import compat

    compat.apply()

    from diffseg import datasets, engine, evaluation, models  # noqa: F401

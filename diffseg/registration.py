"""The package's parts in mmseg's registries, imported when they are needed.

mmseg gives each of its registries a location, a module that is imported when something is first looked up. This adds
one of diffseg's, so that reading a config, or using `diffseg.diffusion` alone, imports neither models nor data sets.
"""

from importlib import import_module

import mmseg.registry

LOCATIONS = {
    'DATASETS': 'diffseg.datasets',
    'HOOKS': 'diffseg.engine',
    'LOOPS': 'diffseg.engine',
    'METRICS': 'diffseg.evaluation',
    'MODELS': 'diffseg.models',
    'TRANSFORMS': 'diffseg.datasets',
    'VISUALIZERS': 'diffseg.engine',
}


def apply() -> None:
    """Add the locations; calling it again changes nothing."""
    for name, location in LOCATIONS.items():
        registry = getattr(mmseg.registry, name)
        if location not in registry._locations:
            registry._locations = [*registry._locations, location]  # not in place: the default is one list for all
            if registry._imported:
                import_module(location)

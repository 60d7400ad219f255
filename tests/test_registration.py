"""Importing diffseg imports none of its parts; mmseg's registries import them when something is looked up."""

import subprocess
import sys

import mmseg.registry
import pytest

from diffseg import registration

HEAVY = ('diffusers', 'transformers', 'peft', 'scipy', 'matplotlib', 'mmseg.models', 'mmseg.datasets', 'diffseg.models')
NAMES = {
    'DATASETS': 'ScarceDataset',
    'HOOKS': 'IterationSeedHook',
    'LOOPS': 'PixelClassifierLoop',
    'METRICS': 'PCKMetric',
    'MODELS': 'DiffusionBackbone',
    'TRANSFORMS': 'LoadLabelArray',
    'VISUALIZERS': 'LabelSizeVisualizer',
}


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, '-c', code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_diffseg_imports_nothing_heavy():
    assert run('import sys, diffseg; print(*set(sys.modules) & set(sys.argv[1:]))', *HEAVY) == '\n'


@pytest.mark.parametrize('absent', ['mmengine', 'mmcv', 'mmseg'])
def test_importing_diffseg_needs_none_of_the_mm_packages(absent):
    run('import sys; sys.modules[sys.argv[1]] = None; import diffseg', absent)


def test_every_registry_finds_what_it_has_to():
    assert NAMES.keys() == registration.LOCATIONS.keys()
    for registry, name in NAMES.items():
        assert getattr(mmseg.registry, registry).get(name).__module__.startswith(registration.LOCATIONS[registry])


USED_AND_NOT_USED_BEFORE = """
from mmseg.registry import LOOPS, METRICS

assert METRICS.get('IoUMetric')
import diffseg
assert METRICS.get('PCKMetric') and LOOPS.get('PixelClassifierLoop')
"""


def test_a_registry_finds_it_whether_or_not_it_was_used_before():
    run(USED_AND_NOT_USED_BEFORE)


@pytest.mark.parametrize('name', ['RUNNERS', 'OPTIMIZERS'])
def test_other_registries_keep_their_locations(name):
    before = [*getattr(mmseg.registry, name)._locations]
    registration.apply()
    assert getattr(mmseg.registry, name)._locations == before
    assert not any(location.startswith('diffseg') for location in before)

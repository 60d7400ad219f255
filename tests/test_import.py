"""What importing the package needs and does."""

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys

sys.modules.update(dict.fromkeys(['mmcv', 'mmengine', 'mmseg']))  # as if they were not installed
import diffseg.diffusion

names = [module.name for module in pkgutil.iter_modules(diffseg.diffusion.__path__)]
for name in names:
    importlib.import_module(f'diffseg.diffusion.{name}')
print(*names)
"""


def test_diffusion_needs_no_mm_package():
    result = subprocess.run([sys.executable, '-c', PROGRAM], check=True, capture_output=True, text=True)
    assert {'activations', 'extractor', 'loading', 'trajectories'} <= set(result.stdout.split())

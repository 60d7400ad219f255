import subprocess
import sys

CODE = """
import sys

for name in ('mmengine', 'mmcv', 'mmseg'):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError

import pkgutil
import diffseg.diffusion

for module in pkgutil.iter_modules(diffseg.diffusion.__path__, 'diffseg.diffusion.'):
    __import__(module.name)
"""


def test_diffusion_needs_none_of_the_mm_packages():
    done = subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

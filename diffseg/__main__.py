"""`python -m diffseg PACKAGE SCRIPT ...` runs a script of mmseg, or of another mm package, after importing diffseg.

mmseg's scripts import mmseg first, which fails under mmcv-lite, where diffseg has not filled the gaps. SCRIPT is the
name of a file among the tools that the installed package carries, such as `print_config`, or a path, such as that of
demo/image_demo.py in a clone, which is not installed.
"""

import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import diffseg  # noqa: F401  fills the gaps, registers its parts


def scripts(package: str) -> dict[str, Path]:
    """The scripts that an installed package carries, by name.

    Raises:
        ValueError: the package is not installed, or carries none.
    """
    spec = find_spec(package)
    folder = Path(spec.origin).parent / '.mim' if spec is not None and spec.origin else None
    found = {path.stem: path for path in sorted(folder.rglob('*.py')) if 'configs' not in path.parts} if folder else {}
    if not found:
        raise ValueError(f'{package} is not installed, or carries no scripts (PACKAGE/.mim); give mmseg, or a path')
    return found


def main(argv: Sequence[str]) -> None:
    """Run a script.

    Args:
        argv: package, script, arguments of the script.
    """
    if len(argv) < 2 or argv[0].startswith('-'):
        raise SystemExit(__doc__)
    package, name, *arguments = argv
    try:
        available = scripts(package)
    except ValueError as error:
        raise SystemExit(f'error: {error}') from None
    script = Path(name) if name.endswith('.py') else available.get(name)
    if script is None or not script.is_file():
        raise SystemExit(f'error: {package} has no script {name}; give a path, or one of {", ".join(available)}')
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.parent)  # as Python has it for a script
    runpy.run_path(str(script), run_name='__main__')


if __name__ == '__main__':
    main(sys.argv[1:])

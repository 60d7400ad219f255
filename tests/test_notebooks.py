"""The notebooks of the documentation run, and what they show is stored."""

from pathlib import Path
from runpy import run_path

import nbformat
import pytest

DOCS = Path(__file__).parents[1] / 'docs'
OUTPUT = {
    'features': ["'up-level3-repeat0-res-increment': (4, 2, 48, 16, 16)", '197 activations', '<PIL.Image.Image'],
    'segmentor': ['mIoU ', 'model.safetensors ', "'background', 'torso'", '<PIL.Image.Image'],
}


def texts(notebook: nbformat.NotebookNode) -> str:
    """All text in the output of a notebook, in one line."""
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', ())]
    return ' '.join(' '.join((output.get('text') or output['data']['text/plain']).split()) for output in outputs)


def test_all_notebooks_are_seen():
    assert {path.stem for path in (DOCS / 'notebooks').glob('*.ipynb')} == OUTPUT.keys()


@pytest.mark.parametrize('name', OUTPUT)
def test_a_notebook_runs(name):
    path = DOCS / f'notebooks/{name}.ipynb'
    stored = texts(nbformat.read(path, 4))
    executed = texts(run_path(str(DOCS / 'execute_notebooks.py'))['execute'](path))
    assert [text for text in OUTPUT[name] if text not in stored or text not in executed] == []
    assert '/' not in stored  # paths of a machine

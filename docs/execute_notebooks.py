"""Execute the notebooks, and store their output without progress bars: `make notebooks`."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / 'notebooks'


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with its output; pictures are PNG alone."""
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=300, resources={'metadata': {'path': str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop('execution', None)  # times
        if cell.cell_type == 'code':
            cell.outputs = [output for output in cell.outputs if output.get('name') != 'stderr']
            for output in cell.outputs:
                output.get('data', {}).pop('image/jpeg', None)
    return notebook


if __name__ == '__main__':
    for path in sorted(FOLDER.glob('*.ipynb')):
        nbformat.write(execute(path), path)
        print(path)

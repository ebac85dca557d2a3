"""Runs the notebook: ``python -m dev.site.notebook`` writes anew what its cells print (a minute)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

QUICKSTART = Path(__file__).parents[2] / "docs" / "notebooks" / "quickstart.ipynb"


def executed(path: Path, instead: Mapping[str, str], folder: Path) -> Any:
    """Run a notebook in a kernel of its own.

    Args:
        path: The notebook; it is not written.
        instead: Text in its cells -> what is run in its place.
        folder: The working directory.

    Returns:
        The notebook, with what its cells printed and nothing of what libraries said on the way.

    Raises:
        CellExecutionError: if a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for old, new in instead.items():
            cell.source = cell.source.replace(old, new)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") == "stdout"]
            cell.execution_count = None
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(QUICKSTART, {}, QUICKSTART.parent), QUICKSTART)

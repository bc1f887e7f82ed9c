"""Runs the notebooks and keeps their outputs in them: `python docs/_notebooks.py [name ...]`, or `make notebooks`."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
DIGEST = "outputs_of"
"""The key of a notebook's metadata that says which code its outputs are of."""


def digest(notebook: Any) -> str:
    """Of all code of a notebook, as nbformat reads it."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def run(path: Path) -> None:
    """Runs a notebook from top to bottom in a process of its own, and writes it with what it shows."""
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which differ in each run
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        DIGEST: digest(notebook),
    }
    nbformat.write(notebook, path)


def main(names: Sequence[str]) -> None:
    """Runs the named notebooks, or all."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if not names or path.stem in names:
            print(path.name)
            run(path)


if __name__ == "__main__":
    main(sys.argv[1:])

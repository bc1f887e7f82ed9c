"""Notebooks are kept with the outputs of the code that they hold. `test_notebooks.py` runs them."""

import hashlib
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RESULTS = {
    "erk_and_one_update": "{'before': 24, 'dropped': 8, 'grown': 8, 'after': 24}",
    "learned_masks": "{'step gates close': True, 'Gibbs ends at its sparsity': True, 'pixels went': True, "
    "'counts are exact': True}",
    "masks_by_hand": "{'by hand is rx.prune': True, 'revived by momentum': 288, 'revived under sparsify': 0}",
    "reading_a_run": "{'seeds': 3, 'RigL - SET at 98 %, points': 5.18}",  # as in the README's table
    "prune_a_trained_model": "{'equal sizes': True, 'random < magnitude < surgeon': True}",
    "really_sparse": "{'same masks': True, 'less memory': True, 'compact is the same function': True}",
    "shrink_channels": "{'fewer weights': True, 'same function': True, 'counted': True}",
    "rigl_on_your_model": "{'linen': True, 'nnx': True}",
    "lottery_tickets": "[True, True, True]",  # a resumed recipe has the bits of one that was not interrupted
}
"""What a cell of each notebook shows."""


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_kept_with_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].cell_type == "markdown", "a notebook opens with what it shows"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code = "\0".join(cell.source for cell in cells)
    kept = notebook.metadata["outputs_of"]
    assert kept == hashlib.sha256(code.encode()).hexdigest()[:16], "its code has changed: make notebooks"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    check(path, [output for cell in cells for output in cell.outputs])
    assert str(Path.home()) not in path.read_text()
    assert str(ROOT) not in path.read_text()


def check(path, outputs):
    """Two pictures, the expected result, and no warning."""
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 2
    shown = [" ".join(output.get("data", {}).get("text/plain", "").split()) for output in outputs]
    assert RESULTS[path.stem] in shown

"""Notebooks run from top to bottom, and show what their kept outputs show."""

import nbclient
import nbformat
import pytest
from traitlets.config import Config

from tests.test_kept_notebooks import NOTEBOOKS, ROOT, check


@pytest.fixture(scope="module")
def client():
    """One process for all notebooks: starting one and importing JAX takes longer than most of them."""
    # Local sockets: over TCP the kernel warns that its traffic could be read.
    local = Config({"KernelManager": {"transport": "ipc"}})
    place = {"metadata": {"path": str(ROOT)}}
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(), timeout=300, config=local, resources=place)
    with client.setup_kernel():
        yield client


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_draws(path, client):
    client.nb = notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))  # without the names of the notebook before
    client.execute(cleanup_kc=False)
    check(path, [output for cell in notebook.cells for output in cell.get("outputs", [])])

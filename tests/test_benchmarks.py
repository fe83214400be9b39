"""The benchmarks run on a small network, resume, and fill every table of the document."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import measured, tables
from benchmarks.peers import turns

_ROOT = Path(__file__).parents[1]


def run(name, *arguments):
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    environment = os.environ | {"PYTHONPATH": str(_ROOT)}
    return subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_step_is_measured_once_and_reported(tmp_path):
    arguments = ("--quick", "--progress=false", f"--results={tmp_path}")
    first = run("step", *arguments, "--only=storage=int8 tokens=32 queries=1")
    assert first.returncode == 0, first.stderr
    (path,) = tmp_path.glob("quick/step_*.json")
    written = path.read_text()
    (cell,) = json.loads(written)["cells"].values()
    assert set(cell["seconds"]) == {"forward", "rank_one", "sparse", "dense"}
    assert all(min(times) > 0 for times in cell["seconds"].values())
    again = run("step", *arguments, "--only=storage=int8 tokens=32 queries=1")
    assert again.returncode == 0
    assert json.loads(path.read_text())["cells"] == json.loads(written)["cells"]
    report = run("report", *arguments)
    assert report.returncode == 0, report.stderr
    assert "step / forward" in report.stdout or "rank-one" in report.stdout
    assert list(tmp_path.glob("quick/*.png"))


def test_every_table_has_its_place_in_the_document():
    document = (_ROOT / "docs" / "performance.md").read_text()
    tables = (_ROOT / "benchmarks" / "tables.py").read_text()
    places = {line.split()[2] for line in document.splitlines() if line.startswith("<!-- table:")}
    names = {line.split('"')[1] for line in tables.split("TABLES:")[1].splitlines() if '"' in line}
    assert places == names


def test_readme_says_what_performance_found():
    (one,) = measured.load(_ROOT / "benchmarks" / "results")
    found = tables.advice(one)
    assert found in (_ROOT / "docs" / "performance.md").read_text()
    (row,) = (
        line
        for line in (_ROOT / "README.md").read_text().splitlines()
        if line.startswith("| [performance]")
    )
    ranges = re.findall(r"\d\.\d+ to \d\.\d+", row)
    assert len(ranges) >= 3
    assert all(words in found for words in ranges)


def test_readme_says_what_the_memory_table_says():
    page = (_ROOT / "docs" / "finetune.md").read_text()
    table = page.split("<!-- table: memory -->")[1].split("<!-- end -->")[0]
    ratios = sorted(re.findall(r"in place.*\| +([\d.]+) \|", table))
    assert len(ratios) == 3
    for name in ("README.md", "docs/index.md"):
        assert f"{ratios[0]} to {ratios[-1]}" in (_ROOT / name).read_text()


def test_a_contestant_calls_when_it_is_told(tmp_path):
    """It says what it is, prints what it likes, and its end in a call is an error with its name."""
    (tmp_path / "counting.py").write_text(
        "from benchmarks.peers.turns import serve\n"
        "calls = []\n"
        "def ready(job):\n"
        "    print('not an answer')\n"
        "    def call():\n"
        "        calls.append(1)\n"
        "        assert len(calls) <= job['most']\n"
        "    return call\n"
        "serve('a counter', ready)\n"
    )
    root = Path(__file__).resolve().parent.parent
    path = {"PYTHONPATH": f"{root}:{tmp_path}"}
    one = turns.Contestant("counting", {"most": 2}, environment=path)
    assert one.version == "a counter"
    one.call()
    one.call()
    assert one.peak > 2**20
    with pytest.raises(RuntimeError, match=r"counting \{\"most\": 2\} ended with code 1"):
        one.call()
    with pytest.raises(RuntimeError, match="ended with code 1"):
        turns.Contestant("counting", {}, environment={"PYTHONPATH": "/nowhere"})

"""The benchmarks run on a small network, resume, and fill every table of the document."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from benchmarks import measured, results, tables
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
    one, *_ = measured.load(_ROOT / "benchmarks" / "results")  # the CPU
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


_GPU = _ROOT / "benchmarks" / "gpu.sh"


def gpu(*arguments, python=sys.executable, **environment):
    """`benchmarks/gpu.sh`, with an interpreter."""
    kept = {name: x for name, x in os.environ.items() if name not in ("JAX_PLATFORMS", "SST2")}
    environment = kept | {"PYTHON": str(python)} | environment
    return subprocess.run([_GPU, *arguments], env=environment, capture_output=True, text=True)


def test_the_gpu_script_says_what_it_needs():
    told = gpu("--help")
    assert told.returncode == 0
    assert "jax[cuda12]" in told.stdout and "--rehearse" in told.stdout
    for wrong in ("--sst=here", "--only=speed", "--seconds=1m"):
        refused = gpu(wrong)
        assert refused.returncode == 2 and refused.stderr.startswith("gpu.sh: "), refused.stderr


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_the_gpu_script_refuses_at_once_where_there_is_none(tmp_path):
    begun = time.perf_counter()
    refused = gpu(f"--output={tmp_path}")
    assert time.perf_counter() - begun < 10  # 0.1 s by itself
    assert refused.returncode == 2
    assert refused.stderr.startswith("gpu.sh: JAX finds no GPU, as its CUDA plugin")
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_others(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'echo "$*; $JAX_PLATFORMS" >>{tmp_path}/asked\n'
        'case "$*" in\n'
        "    -) cat >/dev/null; echo Some GPU ;;\n"
        "    *exactness*) exit 3 ;;\n"
        "    *device*) exec sleep 60 ;;\n"
        "esac\n"
    )
    python.chmod(0o755)
    reviews = tmp_path / "reviews"
    reviews.mkdir()
    done = gpu(f"--output={tmp_path / 'out'}", f"--sst2={reviews}", "--seconds=2", python=python)
    assert done.returncode == 1, done.stderr
    assert "gpu.sh: Some GPU\n" in done.stderr
    *lines, last = done.stdout.strip().splitlines()
    verdicts = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert verdicts["exactness"].endswith("s failed, status 3")
    assert verdicts["device"].endswith("s ran out of time: the same command again goes on")
    assert verdicts["sst2"].startswith(f"skipped: no train.tsv in '{reviews}'")
    assert verdicts["report"].endswith("s passed")
    assert last.startswith(f"results: {tmp_path / 'out'}, after ")
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split("; ")[1] for line in asked[1:]] == ["cuda,cpu", "cuda,cpu", "cpu"]
    assert "--document=-" in asked[-1]
    (reviews / "train.tsv").touch()
    done = gpu(f"--output={tmp_path / 'out'}", "--only=sst2", python=python, SST2=str(reviews))
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text()
    assert [f"--passes={n} " in asked for n in (600, 2400, 9600)] == [True] * 3


@pytest.mark.slow
def test_the_gpu_script_is_rehearsed(tmp_path):
    """As continuous integration does it after the tests."""
    before = sorted((_ROOT / "benchmarks" / "results").iterdir())
    done = gpu("--rehearse", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    for part in ("exactness", "device", "sst2, 75 passes", "report"):
        assert re.search(rf"^{part} +\d+ s  passed$", done.stdout, re.MULTILINE), done.stdout
    exact = json.loads((tmp_path / "quick" / "exactness_cpu.json").read_text())
    assert len(exact["cells"]) == 3 and not exact["failed"]
    assert all(0 <= cell["error"] <= cell["at_most"] for cell in exact["cells"].values())
    assert "| tiny, nf4 |" in done.stdout
    found = json.loads((tmp_path / "quick" / "device_cpu.json").read_text())["cells"]
    one, many = found.values()
    assert set(one["seconds"]) == {"forward", *measured.OF_DEVICE}
    assert set(many["seconds"]) == {"forward", "forward_as_many", "rank_one"}
    assert (tmp_path / "quick" / "performance_device.png").stat().st_size > 10_000
    assert "ZO-SignSGD" in (tmp_path / "sst2_cpu.md").read_text()
    assert (tmp_path / "sst2_cpu" / "layers_1.png").is_file()
    again = gpu("--rehearse", f"--output={tmp_path}")
    assert again.returncode == 0, again.stderr
    assert "exactness: 0 cells measured, 3 were there" in again.stdout
    assert "device: 0 cells measured, 2 were there" in again.stdout
    assert sorted((_ROOT / "benchmarks" / "results").iterdir()) == before


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_cell_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, at_once):
    """It is told, kept, and measured again; what has to be alone begins when others are done."""
    begun, is_mended = [], False

    def measure(cell, effort):
        begun.append(cell.number)
        if cell.number == 0 and not is_mended:
            raise ArithmeticError("no such number")
        return lambda: {"begun": len(begun)}

    def run():
        arguments = ["", "--progress=false", f"--results={tmp_path}"]
        monkeypatch.setattr(sys, "argv", arguments)
        results.run("numbers", lambda quick: [_Number(i) for i in range(4)], measure, at_once)

    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 1
    (path,) = tmp_path.glob("numbers_*.json")
    found = json.loads(path.read_text())
    assert [cell["cell"]["number"] for cell in found["cells"].values()] == [1, 2, 3]
    assert [cell["begun"] for cell in found["cells"].values()] == (
        [2, 3, 4] if at_once == 1 else [2, 4, 4]
    )
    (told,) = found["failed"].values()
    assert told.endswith("ArithmeticError: no such number\n")
    is_mended = True
    run()
    found = json.loads(path.read_text())
    assert len(begun) == 5 and len(found["cells"]) == 4 and not found["failed"]


@dataclasses.dataclass(frozen=True)
class _Number:
    number: int

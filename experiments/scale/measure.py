"""What things take on this machine: `python -m experiments.scale.measure --help`.

Runs `experiments.elastic` with 1, 2 and 4 workers, each of one thread, on a task of its own (see
`load`), and beside it the pieces of a step in one process. Writes the costs that a simulation
needs, and how many steps an hour there were.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments import command
from experiments.command import say
from experiments.files import writable, write_json

_LOAD = "experiments.scale.load"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and where it goes.

    Attributes:
      output: the file to write.
      steps: of each run, after ten that are not counted.
      workers: of each run.
    """

    output: str = str(Path(__file__).resolve().parent / "results" / "measured.json")
    steps: int = 60
    workers: tuple[int, ...] = (1, 2, 4)


def main(settings: Settings) -> None:
    """Measure, and write what was found."""
    output = writable("output", Path(settings.output))
    say("the pieces of a step, in one process")
    heavy, light = _pieces(_LOAD, 10, {}), _pieces(_LOAD, 50, {"LIGHT": "1"})
    runs = {}
    for count in settings.workers:
        say(f"{settings.steps} steps of {count} workers")
        runs[count] = _run(count, settings.steps, {})
    say("steps that evaluate nothing, one worker")
    empty = _run(1, 5 * settings.steps, {"LIGHT": "1"})
    seconds = 3600 / empty["steps_an_hour"]
    trip = (seconds - light["replay"]) / light["pieces"] - light["evaluate"]
    found = {
        "costs": {**heavy, "trip": trip},
        "cores": len(os.sched_getaffinity(0)),
        "runs": [{"workers": count, **run} for count, run in runs.items()],
    }
    write_json(output, found)
    print(f"{found}\nwrote {output}")


def _pieces(module: str, steps: int, variables: dict[str, str]) -> dict[str, float]:
    import json

    line = [sys.executable, "-m", "experiments.scale.pieces", module, str(steps)]
    done = subprocess.run(line, env=_environment(variables), check=True, capture_output=True)
    return json.loads(done.stdout.decode().splitlines()[-1])


def _run(workers: int, steps: int, variables: dict[str, str]) -> dict[str, float]:
    """Steps an hour of a run, by how fast the log grows, and seconds to its first line."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        settings = [f"--module={_LOAD}", f"--log={log}", f"--workers={workers}"]
        settings += [f"--steps={10 + steps}", "--hash_every=1000000", "--checkpoint_every=1000000"]
        line = [sys.executable, "-m", "experiments.elastic", *settings]
        begin = time.perf_counter()
        child = subprocess.Popen(
            line, env=_environment(variables), stderr=subprocess.PIPE, text=True
        )
        marks: dict[int, float] = {}
        while child.poll() is None:
            lines = log.read_bytes().count(b"\n") if log.is_file() else 0
            marks.setdefault(lines, time.perf_counter())
            time.sleep(0.02)
        if child.returncode:
            raise RuntimeError(f"a run of {workers} workers ended with {child.returncode}.")
        last, first = max(marks), min(x for x in marks if x > 10)
        rate = (last - first) / (marks[last] - marks[first])
        start = marks[min(x for x in marks if x > 1)] - begin
        return {"steps_an_hour": 3600 * rate, "seconds_to_first_step": start}


def _environment(variables: dict[str, str]) -> dict[str, str]:
    one_thread = {"JAX_PLATFORMS": "cpu", "NPROC": "1"}  # XLA reads NPROC
    return {**os.environ, **one_thread, **variables}


if __name__ == "__main__":
    command.run(main, Settings, about=__doc__ or "")

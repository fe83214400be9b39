"""A soak of elastic runs: workers and heads are killed at random, and the codes compared.

PYTHONPATH=tests:. python tests/elastic_soak.py --kills=100 --seconds=600 --folder=/tmp/soak
"""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from experiments import command


@dataclasses.dataclass(frozen=True)
class Soak:
    """What is killed, and how often.

    Attributes:
      folder: for the log.
      kills: how many, by SIGKILL.
      seconds: in which they happen, at random moments.
      heads: how many of them are of the head.
      workers: of the run.
      module: what is trained.
      parts: of a batch.
      seed: of the moments and of who is killed.
    """

    folder: str
    kills: int = 100
    seconds: int = 600
    heads: int = 10
    workers: int = 3
    module: str = "elastic_task"
    parts: int = 2
    seed: int = 0


def head(soak, steps, output):
    """A head that runs now."""
    flags = {
        "module": soak.module, "log": f"{soak.folder}/log", "steps": steps, "parts": soak.parts,
        "workers": soak.workers, "lease_seconds": 5, "hash_every": 10,
    }  # fmt: skip
    line = ["-m", "experiments.elastic", *(f"--{name}={x}" for name, x in flags.items())]
    return subprocess.Popen([sys.executable, *line], stdout=output, stderr=output)


def workers_of(pid):
    """Processes of a head's workers."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                names[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])

    def is_below(process):
        while process in parents and process != pid:
            process = parents[process]
        return process == pid

    return [one for one, name in names.items() if name.startswith("ray::Worker") and is_below(one)]


def steps_of(folder):
    """How many steps are in the log."""
    path = Path(folder, "log")
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def main(soak):
    """Kill, and compare."""
    rng, folder = random.Random(soak.seed), Path(soak.folder)
    folder.mkdir(parents=True, exist_ok=True)
    of_heads = set(rng.sample(range(soak.kills), soak.heads))
    moments = sorted(rng.uniform(0, soak.seconds) for _ in range(soak.kills))
    began, killed = time.monotonic(), {"worker": 0, "head": 0}
    with (folder / "said").open("w") as output:
        now = head(soak, 10**9, output)
        for number, moment in enumerate(moments):
            time.sleep(max(0.0, began + moment - time.monotonic()))
            while True:
                assert now.poll() is None, "the head ended by itself"
                found = [now.pid] if number in of_heads else workers_of(now.pid)
                if found:
                    break
                time.sleep(0.1)
            os.kill(rng.choice(found), signal.SIGKILL)
            if number in of_heads:
                now.wait()
                now = head(soak, 10**9, output)
            killed["head" if number in of_heads else "worker"] += 1
            print(f"{time.monotonic() - began:.0f} s, kill {number + 1}, step {steps_of(folder)}")
        before = steps_of(folder)
        while steps_of(folder) < before + 50:
            assert now.poll() is None, "the head ended by itself"
            time.sleep(0.1)
        seconds = time.monotonic() - began
        now.send_signal(signal.SIGINT)
        now.wait()
    steps = steps_of(folder)
    with (folder / "last").open("w+") as output:
        assert head(soak, steps, output).wait() == 0
        output.seek(0)
        said = output.read()
    found = re.search(rf"{steps} steps, hash of the codes (\w+)", said)[1]
    print(f"{killed} killed in {seconds:.0f} s, {steps} steps, hash {found}")
    return steps, found


if __name__ == "__main__":
    command.run(main, Soak, about=__doc__)

"""Runs of several real processes, on the loopback interface."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny_model

from experiments.cluster import ALONE, Cluster, Team
from experiments.finetune.config import Config

EIGHT = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=8")}
ONE = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=1")}


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def begin(commands, environment=ONE):
    """Processes that run now; each command is arguments for Python."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, **environment}
    return [subprocess.Popen([sys.executable, *c], env=environment, **pipes) for c in commands]


def ends(processes, seconds=240):
    """What each process said, and its exit status."""
    try:
        said = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


# The start

JOIN = """
import sys
from experiments import command
from experiments.cluster import Cluster, joined

def main(cluster):
    with joined(cluster) as team:
        print("knows", team.from_first({"step": 3} if team.is_first else None))
        team.check(code="same")
        team.check(**{"data": "a" if team.is_first else sys.argv[-1].strip("-=")})
        print("agree")

command.run(main, Cluster, about="", argv=sys.argv[1:-1])
"""


def join(process, port, data="a", seconds=30, processes=2):
    where = f"--coordinator=127.0.0.1:{port}"
    count = (f"--processes={processes}", f"--process={process}")
    return ["-c", JOIN, where, *count, f"--join_seconds={seconds}", data]


def test_processes_join_and_hear_from_the_first():
    port = free_port()
    for status, said in ends(begin([join(0, port), join(1, port)])):
        assert status == 0, said
        assert "knows {'step': 3}\nagree" in said


def test_processes_with_other_data_are_refused():
    port = free_port()
    found = ends(begin([join(0, port), join(1, port, data="b")]))
    words = "error: not all processes have the same data: process 1 and process 0 differ."
    for status, said in found:
        assert status != 0 and "agree" not in said
    assert words in "".join(said for _, said in found), found


def test_a_coordinator_that_is_not_there_is_waited_for_and_named():
    port = free_port()
    ((status, said),) = ends(begin([join(1, port, seconds=2)]))
    assert status == 1
    words = rf"error: --coordinator: process 0 does not answer at 127\.0\.0\.1:{port} \(.*\) in 2 "
    assert re.search(words, said), said


@pytest.mark.slow
def test_the_first_process_says_that_it_waits_for_the_others():
    port = free_port()
    ((status, said),) = ends(begin([join(0, port, seconds=3, processes=3)]))
    assert status == 1
    assert f"not all of 3 processes have come to 127.0.0.1:{port} in 3 seconds." in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"processes": 2}, "coordinator must be given for 2 processes"),
        ({"coordinator": "here"}, "coordinator must be HOST:PORT or auto, got 'here'"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, r"process must be in \[0, 1\]"),
        ({"processes": 0}, "processes must be at least 1, got 0"),
    ],
)
def test_settings_that_wait_for_nobody_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        Cluster(**given)


def test_parts_must_divide_a_batch():
    with pytest.raises(ValueError, match="parts must divide batch_size=32, got 5"):
        Config(model="m", output="o", parts=5)


def test_one_process_has_one_device_and_what_it_knows():
    assert ALONE.mesh(4, 2).size == 1
    assert dict(Team(0, 1, has_all=True).mesh(2, 4).shape) == {"data": 4, "queries": 1}
    assert dict(Team(0, 1, has_all=True).mesh(4, 1).shape) == {"data": 1, "queries": 4}
    assert ALONE.from_first({"step": 1}) == {"step": 1}


# Fine-tuning


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    tiny_model.write_model(folder / "tiny.gguf")
    tiny_model.write_examples(folder / "examples.jsonl")
    return folder


def run(files, folder, processes=1, environment=ONE, **changes):
    settings = {
        "model": files / "tiny.gguf", "data": files / "examples.jsonl", "output": folder,
        "steps": 12, "batch_size": 6, "eval_every": 6, "checkpoint_every": 2, "density": 0.125,
        "dev_examples": 0, "num_queries": 3, "parts": 3, **changes,
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in settings.items()]
    flags += [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}"]
    commands = [["-m", "experiments.finetune", *flags, f"--process={i}"] for i in range(processes)]
    return begin(commands, environment)


def results(folder):
    return [(folder / name).read_bytes() for name in ("model.gguf", "replay.npz")]


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    """What one process with one device comes to."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    ((status, said),) = ends(run(files, folder))
    assert status == 0, said
    assert results(folder)[0] != (files / "tiny.gguf").read_bytes()
    return results(folder)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_come_to_the_codes_of_one(files, tmp_path, alone, processes):
    for status, said in ends(run(files, tmp_path / "run", processes)):
        assert status == 0, said
    assert results(tmp_path / "run") == alone


@pytest.mark.slow
def test_eight_devices_come_to_the_codes_of_one(files, tmp_path, alone):
    """Three queries and three parts are nine pieces, so their shares are uneven."""
    ((status, said),) = ends(run(files, tmp_path / "run", 1, EIGHT))
    assert status == 0, said
    assert results(tmp_path / "run") == alone
    found = ends(run(files, tmp_path / "none", 2, EIGHT))
    words = "error: --parts must be at least 6 for 16 devices and 3 groups"
    assert all(status == 1 and words in said for status, said in found), found


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_run_of_two_goes_on_as_one_where_a_process_was_killed(files, tmp_path, alone, killed):
    processes = run(files, tmp_path / "run", 2)
    kept = tmp_path / "run" / "checkpoints"
    until = time.monotonic() + 200
    while not list(kept.glob("[0-9]*")):
        assert time.monotonic() < until
        time.sleep(0.01)
    processes[killed].send_signal(signal.SIGKILL)
    ends(processes)
    ((status, said),) = ends(run(files, tmp_path / "run"))
    assert status == 0, said
    assert results(tmp_path / "run") == alone


@pytest.mark.slow
def test_other_settings_are_refused(files, tmp_path):
    flags = run(files, tmp_path / "run", 2)
    first, second = (list(process.args[1:]) for process in flags)
    ends(flags[1:] + flags[:1], 240)
    port = f"--coordinator=127.0.0.1:{free_port()}"
    changed = [
        [port if x.startswith("--coordinator") else x for x in command]
        for command in (first, [*second, "--seed=1"])
    ]
    changed = [[x.replace("/run", "/other") for x in command] for command in changed]
    said = "".join(said for _, said in ends(begin(changed)))
    assert "not all processes have the same settings: process 1 and process 0 differ." in said

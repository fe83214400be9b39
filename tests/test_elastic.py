"""Elastic runs: whoever evaluates what, dies or comes, the codes are those of one process."""

import copy
import errno
import functools
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import elastic_sized_task
import elastic_soak
import elastic_task
import jax
import numpy as np
import pytest
from ray.exceptions import RayActorError, RayError, RayTaskError

import zoqo_jax as zq
from experiments.cluster import digest
from experiments.elastic import head as head_module
from experiments.elastic.config import Config, Module
from experiments.elastic.crew import Crew
from experiments.elastic.head import Head
from experiments.elastic.leases import Answer
from experiments.elastic.log import Log
from experiments.elastic.replica import Replica
from experiments.elastic.task import of_module
from experiments.elastic.worker import Greeting, Worker

RUN = Module("elastic_task", steps=200, parts=2)


@functools.cache
def plain(steps, task=elastic_task):
    """The hash after each step that one process makes."""
    mesh = zq.distributed.mesh(devices=jax.devices()[:1])
    tx = zq.distributed.spread(task.tx, mesh, parts=RUN.parts)

    @jax.jit
    def step(params, state, batch):
        given = {"value_fn": elastic_task.value_fn, "batch": batch}
        updates, state = tx.update(None, state, params, **given)
        return zq.apply_updates(params, updates), state

    params, state = elastic_task.params, tx.init(elastic_task.params)
    found = []
    for number in range(steps):
        params, state = step(params, state, elastic_task.batch(number))
        found.append(digest((params, state)))
    return found


class Replicas:
    """Replicas that share compiled programs."""

    def __init__(self, run=RUN):
        self.first = Replica(of_module(run), hash_every=10)
        self.begin = self.first.arrays()

    def __call__(self, hash_every=10, steps=200):
        """One at step 0."""
        found = copy.copy(self.first)
        found.restore(0, self.begin)
        found.hash_every, found.task = hash_every, found.task._replace(steps=steps)
        return found


@pytest.fixture(scope="module")
def replicas():
    return Replicas()


class Actor:
    """Stands for Ray's handle: methods give a call that is made later."""

    def __init__(self, name, replica):
        self.name, self.worker = name, Worker(RUN, 10)
        self.worker._replica = replica

    def __getattr__(self, method):
        def remote(*given):
            return getattr(self.worker, method), pickle.dumps(given)

        return types.SimpleNamespace(remote=remote)


class Local(Crew):
    """Workers in this process, which answer in random order, and in other ways as told."""

    def __init__(self, config, replicas, faults=(), seed=0):
        self.config, self.members, self.faults = config, {}, dict(faults)
        self.wanted, self.not_before, self._run, self._count = config.workers, 0.0, RUN, 0
        self._kind, self._replicas, self._random = self, replicas, random.Random(seed)

    def remote(self, run, hash_every):
        return Actor(f"worker {self._count}", self._replicas(hash_every))

    def events(self, seconds):
        waiting = [one for one in self.members.values() if one.call is not None]
        for member in self._random.sample(waiting, min(1, len(waiting))):
            (call, given), worker = member.call, member.actor.worker
            try:
                answer = call(*pickle.loads(given))
                if member.name in self.faults and call != worker.begin:
                    answer = self.faults[member.name](worker._replica, answer)
            except Silent:
                continue
            except RayError as error:
                answer = error
            member.call = None
            yield member, answer if isinstance(answer, Exception) else again(answer)

    def drop(self, member):
        self.members.pop(member.name, None)

    def room(self):
        return "no room"


class Silent(Exception):
    """No answer."""


def again(answer):
    return pickle.loads(pickle.dumps(answer))


def dies_at(step):
    def fault(replica, answer):
        if replica.step >= step:
            raise RayActorError
        return answer

    return fault


def config(tmp_path, **given):
    usual = {"workers": 3, "hash_every": 10, "checkpoint_every": 50, "lease_seconds": 1e-3}
    return Config(**{"log": str(tmp_path / "log"), **usual, **given})


def made(config, replicas, faults=(), seed=0, steps=200):
    """A head that has made all steps."""
    head = Head(config, replicas(config.hash_every, steps))
    head.catch_up(progress=False)
    head.run(Local(config, replicas, faults, seed), progress=False)
    return head


def test_workers_that_die_and_come_and_a_head_that_does_leave_the_codes_of_one_process(
    tmp_path, replicas, capsys
):
    """Leases are over at once here, so much is evaluated twice, and in random order."""
    given = config(tmp_path)
    faults = {f"worker {i}": dies_at(step) for i, step in [(1, 17), (3, 40), (4, 90)]}

    class Killed(BaseException):
        pass

    def kills(replica, answer):
        if replica.step >= 123:
            raise Killed
        return answer

    with pytest.raises(Killed):
        made(given, replicas, {**faults, "worker 5": kills})
    log = tmp_path / "log"
    log.write_bytes(log.read_bytes()[:-9])
    head = made(given, replicas, seed=1)
    assert head.replica.digest() == plain(200)[-1]
    _, records = Log(given.log).read()
    assert [x.step for x in records] == list(range(200))
    assert [x.hash for x in records[10::10]] == plain(200)[9:190:10]
    said = capsys.readouterr().err
    assert said.count("is lost, another is asked for") == 3
    assert said.count("is there") == 3 + 3 + 3


@pytest.mark.slow
def test_steps_that_size_themselves_are_those_of_one_process(tmp_path):
    """Steps that look at the loss before and after them have a second round of pieces."""
    replicas = Replicas(Module("elastic_sized_task", parts=2))
    head = made(config(tmp_path), replicas, {"worker 1": dies_at(5)}, steps=30)
    assert head.replica.digest() == plain(30, elastic_sized_task)[-1]
    assert sum(x.look is not None for x in Log(head.config.log).read()[1]) > 3


@pytest.mark.parametrize("hash_every", [10, 1])
def test_a_worker_with_other_codes_is_expelled(hash_every, tmp_path, replicas, capsys):
    def goes_wrong(replica, answer):
        if replica.step >= 7 and not hasattr(replica, "is_wrong"):
            replica.is_wrong = True
            leaf = replica._trained["out"]
            replica._trained["out"] = leaf.with_codes(leaf.codes[::-1])
        return answer

    given = config(tmp_path, hash_every=hash_every, workers=2)
    head = made(given, replicas, {"worker 2": goes_wrong}, steps=40)
    assert list(head.expelled) == ["worker 2"]
    said = capsys.readouterr().err
    assert re.search(r"worker 2 \(.*\) is expelled: its codes before step \d+ have the hash", said)
    if hash_every == 1:  # then none of the losses of its codes was entered
        assert head.replica.digest() == plain(200)[39]


def test_newcomers_with_another_task_or_version_are_expelled(tmp_path, replicas, capsys):
    def has_other_data(replica, answer):
        if isinstance(answer, Greeting):
            return answer._replace(depends_on={**answer.depends_on, "data": "ab"})
        return answer

    def is_older(replica, answer):
        return answer._replace(versions="ab") if isinstance(answer, Greeting) else answer

    faults = {"worker 1": has_other_data, "worker 2": is_older}
    head = made(config(tmp_path), replicas, faults, steps=20)
    assert head.replica.digest() == plain(200)[19]
    said = capsys.readouterr().err
    assert re.search(
        r"worker 1 \(.*\) is expelled: it has another data, 'ab' instead of '\w+'", said
    )
    assert re.search(r"worker 2 \(.*\) is expelled: it has another version of the code", said)
    with pytest.raises(RuntimeError, match="workers: all were expelled: worker 1: it has"):
        made(config(tmp_path / "2", workers=1), replicas, faults)


def test_answers_that_no_sound_worker_gives_never_enter(tmp_path, replicas, capsys):
    def spoils(change):
        def fault(replica, answer):
            is_one = isinstance(answer, Answer) and answer.found is not None and replica.step > 3
            return answer._replace(found=change(answer.found)) if is_one else answer

        return fault

    faults = {
        "worker 1": spoils(lambda found: np.full_like(found, np.nan)),
        "worker 2": spoils(lambda found: found[..., :1]),
    }
    head = made(config(tmp_path), replicas, faults, steps=20)
    assert head.replica.digest() == plain(200)[19]
    assert sorted(head.expelled) == ["worker 1", "worker 2"]
    assert "it found nan and nan where worker" in head.expelled["worker 1"]


def test_workers_that_are_silent_are_replaced(tmp_path, replicas, capsys):
    def silent(replica, answer):
        if replica.step >= 5:
            raise Silent
        return answer

    given = config(tmp_path, lost_seconds=1.0)
    head = made(given, replicas, {"worker 1": silent, "worker 2": silent}, steps=200)
    assert head.replica.digest() == plain(200)[-1] and not head.expelled
    said = capsys.readouterr().err
    for name in ("worker 1", "worker 2"):
        words = rf"{name} \(.*\) is lost, another is asked for: it has not answered"
        assert re.search(words, said)


def test_errors_of_all_workers_end_the_run(tmp_path, replicas, monkeypatch):
    def fails(replica, answer):
        raise RayTaskError(
            "greet", "Traceback\n  ...\nValueError: model: no such file", ValueError()
        )

    monkeypatch.setattr(head_module, "_PAUSE", 0.0)
    words = "workers: 3 failed, and no step was made: ValueError: model: no such file"
    with pytest.raises(RuntimeError, match=words):
        made(config(tmp_path), replicas, {f"worker {i}": fails for i in range(9)})


def test_where_no_worker_comes_the_head_says_so(tmp_path, replicas, monkeypatch, capsys):
    def silent(replica, answer):
        raise Silent

    monkeypatch.setattr(head_module, "_SAYS_EVERY", 0.3)
    given = config(tmp_path, workers=1, join_seconds=1)
    with pytest.raises(ConnectionError, match=r"workers: none has come in \d seconds: no room"):
        made(given, replicas, {"worker 1": silent})
    assert "waiting for a worker, 0 seconds: no room" in capsys.readouterr().err


def test_a_full_disk_is_waited_for(tmp_path, replicas, monkeypatch, capsys):
    """The fifth line and the ones after it find no room for a while, and then they do."""
    count, fsync = [0], os.fsync

    def full(file):
        count[0] += 1
        if 5 <= count[0] < 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    head = made(config(tmp_path), replicas, steps=20)
    assert head.replica.digest() == plain(200)[19]
    assert "log: No space left on device: waiting for room" in capsys.readouterr().err
    assert len(Log(str(tmp_path / "log")).read()[1]) == 20


def test_a_log_of_another_run_or_of_other_codes_is_refused(tmp_path, replicas):
    given = config(tmp_path)
    made(given, replicas, steps=20)
    other = replicas()
    other.task = other.task._replace(depends_on={**other.task.depends_on, "parts": 4})
    with pytest.raises(ValueError, match=r"log: .* has a run with another parts, 2 instead of 4"):
        Head(given, other)
    begins, records = Log(given.log).read()
    (tmp_path / "log").unlink()
    log = Log(given.log)
    log.read()
    log.begin(begins)
    for one in records:
        log.append(one._replace(losses=one.losses[::-1]))
    for path in tmp_path.glob("log.checkpoint-*"):
        path.unlink()
    head = Head(given, replicas(steps=20))
    with pytest.raises(ValueError, match=r"log: .* says that the codes before step 10 have the ha"):
        head.catch_up(progress=False)


def test_a_log_goes_on_at_any_address(tmp_path, replicas):
    given = config(tmp_path, log=f"memory:/{tmp_path}/log")
    made(given, replicas, steps=60)
    assert made(given, replicas, steps=70).replica.digest() == plain(200)[69]


# By Ray


def elastic(*arguments):
    line = [sys.executable, "-m", "experiments.elastic", "--module=elastic_task", "--parts=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    paths = os.pathsep.join(map(str, Path(__file__).resolve().parents[:2]))
    return subprocess.Popen([*line, *arguments], env={**os.environ, "PYTHONPATH": paths}, **pipes)


def heard(process, words):
    """The first match of words in what a process says, and all until then."""
    said = ""
    while not (found := re.search(words, said)):
        more = process.stdout.read(1)
        assert more, said
        said += more
    return found


def test_a_worker_that_is_killed_and_a_command_that_is_given_again(tmp_path):
    log = f"--log={tmp_path}/log"
    first = elastic(log, "--steps=100000000", "--hash_every=10", "--workers=1")
    worker = heard(first, r"worker 1 is there \(process (\d+) on ")
    heard(first, "1 workers, loss")
    os.kill(int(worker[1]), signal.SIGKILL)
    heard(first, "it was killed, or its machine is gone")
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=200)
    assert first.returncode == 128 + signal.SIGINT
    steps = int(re.search(r"stopped: (\d+) of 100000000 steps are in ", said)[1])
    again = elastic(log, f"--steps={steps}")
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said
    assert f"{steps} steps, hash of the codes {plain(steps)[-1]}" in said


def test_an_address_where_nobody_answers_is_named(tmp_path):
    process = elastic(f"--log={tmp_path}/log", "--address=127.0.0.1:1", "--join_seconds=1")
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "error: --address: nobody answers at 127.0.0.1:1 in 1 seconds: Connection ref" in said


@pytest.mark.slow
def test_a_minute_of_kills(tmp_path):
    steps, found = elastic_soak.main(elastic_soak.Soak(str(tmp_path), 8, 60, heads=2))
    assert steps >= 50 and found == plain(steps)[-1]

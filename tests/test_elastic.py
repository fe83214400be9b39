"""Elastic runs: whoever evaluates what, dies or comes, the codes are those of one process."""

import functools
import pickle
import random
import types

import elastic_task
import jax
import pytest
from ray.exceptions import RayActorError, RayError

import zoqo_jax as zq
from experiments.cluster import digest
from experiments.elastic.config import Config, Module
from experiments.elastic.crew import Crew
from experiments.elastic.head import Head
from experiments.elastic.log import Log
from experiments.elastic.replica import Replica
from experiments.elastic.task import of_module
from experiments.elastic.worker import Worker

RUN = Module("elastic_task", steps=200, parts=2)


@functools.cache
def plain(steps):
    """The hash after each step that one process makes."""
    mesh = zq.distributed.mesh(devices=jax.devices()[:1])
    tx = zq.distributed.spread(elastic_task.tx, mesh, parts=RUN.parts)

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
    """Replicas that tests use again: each has its programs compiled."""

    def __init__(self):
        self.free, self.lent = [], []

    def __call__(self):
        """One at step 0."""
        if not self.free:
            replica = Replica(of_module(RUN), hash_every=10)
            self.begin = replica.arrays()
            self.free.append(replica)
        replica = self.free.pop()
        replica.restore(0, self.begin)
        self.lent.append(replica)
        return replica

    def back(self, replica):
        if replica in self.lent:
            self.lent.remove(replica)
            self.free.append(replica)


@pytest.fixture(scope="module")
def _replicas():
    return Replicas()


@pytest.fixture
def replicas(_replicas):
    yield _replicas
    _replicas.free += _replicas.lent
    _replicas.lent = []


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
        return Actor(f"worker {self._count}", self._replicas())

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
        self._replicas.back(member.actor.worker._replica)

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
    return Config(log=str(tmp_path / "log"), **{**usual, **given})


def made(config, replicas, faults=(), seed=0):
    """A head that has made all steps."""
    head = Head(config, replicas())
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

"""A worker: a Ray actor with a replica of the codes, which follows the log and answers leases."""

import os
import platform
from typing import Any, NamedTuple

import numpy as np

from experiments.elastic.leases import Answer, Lease
from experiments.elastic.log import Record

__all__ = ["Greeting", "Start", "Worker"]


class Greeting(NamedTuple):
    """What a worker says when it is there."""

    host: str
    process: int
    depends_on: dict[str, Any]
    versions: str


class Start(NamedTuple):
    """Where a newcomer begins: the arrays of a checkpoint, before this step."""

    step: int
    arrays: list[np.ndarray]


class Worker:
    """A replica and what it is asked; one thread, so calls come one after another.

    Args:
      run: the settings of the task, a dataclass.
      hash_every: steps between hashes.
    """

    def __init__(self, run: Any, hash_every: int) -> None:
        self._run, self._hash_every = run, hash_every
        self._replica: Any = None

    def greet(self) -> Greeting:
        """Load the task, and say who this is and what its replica depends on."""
        from experiments.cluster import code_digest
        from experiments.elastic.replica import Replica
        from experiments.elastic.tasks import task_of

        self._replica = self._replica or Replica(task_of(self._run), self._hash_every)
        depends_on = self._replica.task.depends_on
        return Greeting(platform.node(), os.getpid(), depends_on, code_digest())

    def begin(self, start: Start | None) -> None:
        """Take the place of a replica that is further."""
        if start is not None:
            self._replica.restore(*start)

    def work(
        self, records: list[Record], lease: Lease | None, losses: np.ndarray | None = None
    ) -> Answer:
        """Follow the log, and answer a lease.

        Args:
          records: the log's steps from the replica's on.
          lease: what to evaluate, at the step after them.
          losses: of that step's queries, where the lease is for a look.
        """
        self._replica.follow(records)
        hashes, self._replica.hashes = self._replica.hashes, {}
        found = None if lease is None else self._replica.evaluate(lease, losses)
        if self._replica.hash_every == 1:  # also between two leases of a step codes may go wrong
            hashes[self._replica.step] = self._replica.digest()
        return Answer(lease, found, hashes, self._replica.step)

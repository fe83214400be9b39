"""Processes that make one run together, on one machine or many, by `jax.distributed`.

Each has the same program, settings and data, and evaluates its share of every step; process 0
writes what there is to write. They are compared before the first step, since processes that differ
would each train another model.
"""

import dataclasses
import functools
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments import command, settings
from experiments.command import say

__all__ = ["ALONE", "Cluster", "Team", "code_digest", "digest", "here", "joined"]

_SAYS_EVERY = 10.0  # seconds between two words about a wait
_LAST = 3.0  # seconds that process 0 stays when it fails


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Which processes make a run together. They need not share a disk.

    Attributes:
      coordinator: HOST:PORT of process 0, where the others find it; "auto" under Slurm, Open MPI
        and others where jax.distributed finds all three by itself; empty: this process is alone.
      processes: how many make the run; the same command is given to each, but for `process`.
      process: the number of this one, from 0; process 0 writes the results, and has to be at the
        coordinator's address.
      join_seconds: how long to wait for the other processes at the start.

    Raises:
      ValueError: a setting outside what is said above, naming it and its value.

    Example:
      >>> Cluster(coordinator="localhost:1234", processes=2, process=2)
      Traceback (most recent call last):
      ValueError: process must be in [0, 1], got 2.
    """

    coordinator: str = ""
    processes: int = 1
    process: int = 0
    join_seconds: int = 120

    def __post_init__(self) -> None:
        """Refuse what would end in a wait for nobody."""
        settings.check(self, least={"processes": 1, "join_seconds": 1})
        settings.check(self, within={"process": (0, self.processes - 1)})
        if not self.coordinator and self.processes > 1:
            raise ValueError(f"coordinator must be given for {self.processes} processes.")
        if self.coordinator not in ("", "auto"):
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 2**16:
                raise ValueError(
                    f"coordinator must be HOST:PORT or auto, got {self.coordinator!r}."
                )


class Team:
    """The processes of a run, as one of them sees them.

    Args:
      index: the number of this one.
      count: how many there are.
      has_all: whether all their devices share a step, or the first one alone makes it.

    Example:
      >>> alone = Team(0, 1)
      >>> alone.is_first, alone.from_first({"step": 3}), alone.check(code="a1b2")
      (True, {'step': 3}, None)
    """

    def __init__(self, index: int, count: int, has_all: bool = False) -> None:
        self.index, self.count, self.is_first = index, count, index == 0
        self._has_all, self._is_there = has_all, has_all

    def mesh(self, groups: int, parts: int) -> Any:
        """A mesh of all devices, in the arrangement that lets them wait least for each other.

        Args:
          groups: of queries that are evaluated at once, in a step.
          parts: of a batch.

        Raises:
          ValueError: there are more devices than a step has pieces for.
        """
        import jax

        from zoqo_jax.transforms import distributed

        devices = jax.devices() if self._has_all else jax.devices()[:1]
        total = len(devices)
        if total > groups * parts:
            raise ValueError(
                f"parts must be at least {-(-total // groups)} for {total} devices and {groups} "
                f"groups of queries a step, got {parts}."
            )
        divisors = [n for n in range(1, total + 1) if total % n == 0]
        pieces = lambda n: -(-groups // n) * -(-parts // (total // n))  # noqa: E731
        return distributed.mesh(min(divisors, key=pieces), devices)

    def check(self, **digests: str) -> None:
        """Compare what all processes must have the same of.

        Args:
          digests: of each thing, by its name.

        Raises:
          ValueError: a process has another, naming the thing and the process.
        """
        if self.count == 1:
            return
        names = list(digests)
        own = [hashlib.sha256(digests[name].encode()).digest() for name in names]
        for name, found in zip(names, self._gathered(own), strict=True):
            other = [i for i, digest in enumerate(found) if digest != found[0]]
            if other:
                which = " and ".join(f"process {i}" for i in other)
                raise ValueError(
                    f"not all processes have the same {name}: {which} and process 0 differ."
                )

    def from_first(self, facts: Any) -> Any:
        """What process 0 knows, JSON's kinds of things, for every process."""
        if self.count == 1:
            return facts
        import numpy as np

        text = np.frombuffer(json.dumps(facts).encode() if self.is_first else b"", np.uint8)
        length = int(self.arrays_from_first([np.int32(len(text))])[0])
        padded = text if self.is_first else np.zeros(length, np.uint8)
        return json.loads(bytes(self.arrays_from_first([padded])[0]))

    def arrays_from_first(self, arrays: list[Any]) -> list[Any]:
        """Process 0's arrays, in place of arrays of the same shapes and dtypes, bit for bit."""
        if self.count == 1:
            return arrays
        import numpy as np
        from jax.experimental import multihost_utils

        plain = [np.asarray(x) for x in arrays]
        as_bytes = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in plain]
        sent = multihost_utils.broadcast_one_to_all(as_bytes, is_source=self.is_first)
        pairs = zip(sent, plain, strict=True)
        return [np.asarray(y).astype(np.uint8).view(x.dtype).reshape(x.shape) for y, x in pairs]

    def leave(self) -> None:
        """End the cooperation, when all have come here; each goes on by itself."""
        if self._is_there:
            import jax

            self._is_there = False
            jax.distributed.shutdown()

    def _gathered(self, digests: list[bytes]) -> list[list[bytes]]:
        """For each digest that of every process."""
        import numpy as np
        from jax.experimental import multihost_utils

        own = np.stack([np.frombuffer(digest, np.uint8) for digest in digests])
        found = np.asarray(multihost_utils.process_allgather(own)).astype(np.uint8)
        return [[bytes(one) for one in of_thing] for of_thing in found.swapaxes(0, 1)]


ALONE = Team(0, 1)


def here(tree: Any) -> Any:
    """Arrays that every device has, as those of this process alone; nothing is copied."""
    import jax

    def one(x: Any) -> Any:
        is_spread = isinstance(x, jax.Array) and len(x.sharding.device_set) > 1
        return x.addressable_data(0) if is_spread else x

    return jax.tree.map(one, tree)


@contextmanager
def joined(cluster: Cluster) -> Iterator[Team]:
    """The team of a run, once all of its processes are there.

    Raises:
      ConnectionError: they are not, in time; it says which was waited for.
    """
    if not cluster.coordinator:
        yield Team(0, 1)
        return
    _join(cluster)
    import jax

    team = Team(jax.process_index(), jax.process_count(), has_all=True)
    if team.count > 1:
        # A process that fails ends at once: JAX would wait for the others, and they for it.
        command.end_by(functools.partial(_cut, team))
    yield team
    team.leave()
    command.end_by(sys.exit)


def _join(cluster: Cluster) -> None:
    """Start JAX as one of several processes. A thread waits, so that a stop takes effect."""
    import jax

    found: list[BaseException] = []
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    given = {}
    if cluster.coordinator != "auto":
        given = {
            "coordinator_address": cluster.coordinator,
            "num_processes": cluster.processes,
            "process_id": cluster.process,
        }

    def start() -> None:
        try:
            # Where the time is over before ours is, XLA ends the process without a word to us.
            jax.distributed.initialize(initialization_timeout=cluster.join_seconds + 60, **given)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    began, said = time.monotonic(), 0.0
    while thread.is_alive():
        thread.join(0.1)
        waited = time.monotonic() - began
        if waited > cluster.join_seconds and thread.is_alive():
            raise ConnectionError(f"{_whom(cluster)} in {cluster.join_seconds} seconds.")
        if waited - said > _SAYS_EVERY:
            said = waited
            say(f"{_whom(cluster)} yet, after {waited:.0f} of {cluster.join_seconds} seconds")
    if found:
        words = " ".join(str(found[0]).split())
        raise ConnectionError(f"coordinator {cluster.coordinator}: {words}") from found[0]


def _whom(cluster: Cluster) -> str:
    """Who has not come."""
    if cluster.coordinator == "auto":
        return "coordinator: the processes that the scheduler started have not all come"
    if cluster.process:
        host, _, port = cluster.coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
        except OSError as error:
            words = error.strerror or str(error)
            return f"coordinator: process 0 does not answer at {cluster.coordinator} ({words})"
    return (
        f"coordinator: not all of {cluster.processes} processes have come to {cluster.coordinator}"
    )


def _cut(team: Team, status: int) -> None:
    """End this process as it stands.

    XLA ends a process that loses its connection to process 0, with a trace of its own. So where all
    are refused for one reason, process 0 goes last, and each has said it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if team.is_first:
        time.sleep(_LAST)
    os._exit(status)


def code_digest() -> str:
    """What tells this version of the library, of the experiments and of JAX from another."""
    import jax

    import experiments
    import zoqo_jax

    digest = hashlib.sha256(jax.__version__.encode())
    for package in (zoqo_jax, experiments):
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def digest(tree: Any) -> str:
    """What tells a tree's arrays from others, keys by their words."""
    import jax
    import numpy as np

    from experiments.leaves import as_arrays

    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):  # one at a time: on an accelerator each is copied
        x = np.ascontiguousarray(*as_arrays(leaf))
        found.update(repr((x.shape, str(x.dtype))).encode())
        found.update(x.reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]

"""The workers of a run, as its head sees them: Ray starts, places and reaches them."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError

from experiments.elastic.config import Config
from experiments.elastic.leases import Lease
from experiments.elastic.log import Record
from experiments.elastic.worker import Worker

__all__ = ["Crew", "Member"]


@dataclasses.dataclass
class Member:
    """A worker.

    Attributes:
      name: what messages call it.
      actor: Ray's handle.
      call: the answer that is awaited, and since when.
      has: the step that its replica will be before when the call is answered; None while it is not
        known whether it is one of ours.
      host: where it is, and its process.
    """

    name: str
    actor: Any
    call: Any
    since: float
    has: int | None = None
    where: str = ""

    @property
    def is_idle(self) -> bool:
        """Whether it waits for work."""
        return self.call is None and self.has is not None


class Crew:
    """All workers that there are.

    Args:
      config: who makes the run.
      run: the settings of the task.
    """

    def __init__(self, config: Config, run: Any) -> None:
        self.config = config
        self.members: dict[str, Member] = {}
        self.wanted, self.not_before = config.workers, 0.0  # the time when another may be asked for
        self._run, self._count = run, 0
        # Reports of every call to Ray's head were 29 % of the bytes on the wire.
        options = {
            "num_cpus": config.cpus,
            "num_gpus": config.gpus,
            "max_restarts": 0,
            "enable_task_events": False,
        }
        self._kind = ray.remote(**options)(Worker)

    def hire(self) -> None:
        """Ask for as many workers as are wanted; Ray starts each where there is room for it."""
        while len(self.members) < self.wanted and time.monotonic() >= self.not_before:
            self._count += 1
            name = f"worker {self._count}"
            actor = self._kind.remote(self._run, self.config.hash_every)
            self.members[name] = Member(name, actor, actor.greet.remote(), time.monotonic())

    def admit(self, member: Member, start: Any, step: int) -> None:
        """Have a newcomer begin at a step, with its arrays or Ray's name of them."""
        member.has = step
        self._call(member, member.actor.begin.remote(start))

    def send(
        self, member: Member, records: list[Record], lease: Lease | None, losses: Any = None
    ) -> None:
        """Have a worker follow the log, and give it a lease."""
        if records:
            member.has = records[-1].step + 1
        self._call(member, member.actor.work.remote(records, lease, losses))

    def _call(self, member: Member, call: Any) -> None:
        member.call, member.since = call, time.monotonic()

    def events(self, seconds: float) -> Iterator[tuple[Member, Any]]:
        """What workers answered, and errors in place of it; waits so long for a first one."""
        calls = {one.call: one for one in self.members.values() if one.call is not None}
        if not calls:
            time.sleep(min(seconds, 0.1))
            return
        ready, _ = ray.wait(list(calls), num_returns=1, timeout=seconds)
        if ready and len(calls) > 1:
            ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        for call in ready:
            member = calls[call]
            member.call = None
            try:
                yield member, ray.get(call)
            except RayError as error:
                yield member, error

    def overdue(self) -> list[Member]:
        """Workers that have not answered for so long that they are taken for lost."""
        now = time.monotonic()
        known = [x for x in self.members.values() if x.call is not None and x.has is not None]
        return [x for x in known if now - x.since > self.config.lost_seconds]

    def drop(self, member: Member) -> None:
        """Let a worker go."""
        self.members.pop(member.name, None)
        with contextlib.suppress(RayError, ValueError):
            ray.kill(member.actor)

    @property
    def present(self) -> list[Member]:
        """Workers that are known to be of this run."""
        return [x for x in self.members.values() if x.has is not None]

    def room(self) -> str:
        """What the cluster has, and what is asked of it, in words."""
        total, free = ray.cluster_resources(), ray.available_resources()
        words = [
            f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s of the cluster are free, and "
            f"each takes {each:g}"
            for kind, each in (("CPU", self.config.cpus), ("GPU", self.config.gpus))
            if each
        ]
        return " ".join(["; ".join(words), f"({len(self.members)} are asked for)"]).strip()

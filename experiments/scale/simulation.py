"""A run of workers that come and go, simulated: who works when, waits, dies and catches up.

The rules are those of `experiments.elastic`; the engine is SimPy, and the seconds are given
(`Costs`), so that a run of ten thousand workers can be looked at on one core. What is evaluated is
left out: only how long it takes.
"""

import dataclasses
import heapq
import math
from collections import deque
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import simpy

from experiments import settings

__all__ = ["Costs", "Outcome", "Plan", "simulate"]

_Steps = Generator[simpy.Event, Any, None]


@dataclasses.dataclass(frozen=True)
class Costs:
    """What things take, in seconds, where nothing else is said.

    Defaults are of SmolLM2's 106 million codes on one of our cores: a query and a replayed step as
    measured, and the shares of slow machines and of failures assumed.

    Attributes:
      evaluate: both sides of one query on the whole batch.
      spread: standard deviation of the logarithm of `evaluate` from one time to the next.
      slow: share of the workers on slow machines.
      slower: how many times as long a slow machine takes.
      replay: a step of the log, of which the losses are known.
      message: what a lease and its answer cost the head, together.
      latency: of a lease and its answer, together, which the worker waits for.
      record: a step's record in the log, until it is safe.
      start: a new process, until it asks for the checkpoint.
      load: the checkpoint.
      lifetime: of a worker, on average, in hours; a dead one is replaced at once.
    """

    evaluate: float = 5.2
    spread: float = 0.1
    slow: float = 0.05
    slower: float = 3.0
    replay: float = 0.64
    message: float = 0.001
    latency: float = 0.005
    record: float = 0.002
    start: float = 10.0
    load: float = 5.0
    lifetime: float = 24.0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        settings.check(
            self,
            within={"slow": (0, 1)},
            positive=("evaluate", "lifetime"),
            not_negative=(
                *("spread", "slower", "replay", "message", "latency", "record", "start", "load"),
            ),
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What can be chosen.

    Attributes:
      workers: processes that evaluate.
      queries: of a step.
      parts: of a batch; a piece of work is one query on one part.
      share: of the pieces that nobody has, which is divided among all workers; a worker that waits
        is given such a part of it, at least one piece.
      patience: how many times its usual time a lease is waited for, before another worker has it.
      checkpoint_every: steps from one checkpoint to the next.
      cores: of the machine, where all workers are on one, each a single thread; 0: each worker has
        a machine of its own.
    """

    workers: int
    queries: int
    parts: int = 1
    share: float = 0.25
    patience: float = 3.0
    checkpoint_every: int = 100
    cores: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        names = ("workers", "queries", "parts", "checkpoint_every")
        least = {**dict.fromkeys(names, 1), "cores": 0}
        settings.check(self, least=least, positive=("patience", "share"))


class Outcome(NamedTuple):
    """What a simulated run came to.

    Attributes:
      steps_an_hour: that were closed.
      queries_an_hour: of closed steps.
      wasted: share of the workers' time of evaluating whose answers did not count: late ones, of
        workers that died, of leases that another had answered.
      waiting: share of the workers' time without a lease.
      catch_up: seconds that a newcomer takes for the checkpoint and the steps since, the median of
        all; None without any.
      newcomers: workers that took the place of dead ones.
      again: leases given to another, a step.
    """

    steps_an_hour: float
    queries_an_hour: float
    wasted: float
    waiting: float
    catch_up: float | None
    newcomers: int
    again: float


class _Lease(NamedTuple):
    """The pieces `first`, ..., `last - 1` of a step, given out for the `time`-th time."""

    step: int
    first: int
    last: int
    time: int = 1


class _Free(NamedTuple):
    """A worker without work, and its answer to a lease, if it had one."""

    number: int  # of the worker
    wakes: simpy.Event  # with the next lease
    lease: _Lease | None = None
    seconds: float = 0.0


class _Late(NamedTuple):
    """A lease that has been out for long."""

    lease: _Lease


def simulate(plan: Plan, costs: Costs, steps: int = 20, seed: int = 0) -> Outcome:
    """A run of so many steps, from all workers ready to the last step's record.

    Args:
      plan: what is chosen.
      costs: what things take.
      steps: closed before the run ends, at least 1.
      seed: of stragglers and deaths.

    Example:
      >>> calm = Costs(evaluate=1.0, spread=0.0, slow=0.0, replay=0.0, message=0.0, latency=0.0,
      ...              record=0.0, lifetime=1e9)
      >>> round(simulate(Plan(workers=2, queries=8), calm, steps=3).steps_an_hour)
      900
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    return _Run(plan, costs, steps, seed).outcome()


class _Run:
    def __init__(self, plan: Plan, costs: Costs, steps: int, seed: int) -> None:
        self.plan, self.costs, self.steps = plan, costs, steps
        self.rng = np.random.default_rng(seed)
        self.env = simpy.Environment()
        self.inbox = simpy.Store(self.env)  # of the head
        self.step = 0  # closed so far
        self.useful = self.worked = 0.0
        self.catch_ups: list[float] = []
        self.again = 0
        self.hired = plan.workers
        sharing = max(1.0, plan.workers / plan.cores) if plan.cores else 1.0
        self.piece = costs.evaluate / plan.parts * sharing
        self.replay = costs.replay * sharing

    def outcome(self) -> Outcome:
        for number in range(self.plan.workers):
            self.env.process(self._worker(number, is_new=False))
        done = self.env.process(self._head())
        self.env.run(until=done)
        hours = self.env.now / 3600
        there = self.env.now * self.plan.workers
        return Outcome(
            self.steps / hours,
            self.steps * self.plan.queries / hours,
            1 - self.useful / self.worked if self.worked else 0.0,
            max(0.0, 1 - self.worked / there),
            float(np.median(self.catch_ups)) if self.catch_ups else None,
            len(self.catch_ups),
            self.again / self.steps,
        )

    def _head(self) -> _Steps:
        """Leases out, answers in, one after another; each costs the head its time."""
        free: list[tuple[int, simpy.Event]] = []  # a heap: the first ones work at every step
        pieces = self.plan.queries * self.plan.parts
        for step in range(self.steps):
            left, is_there, missing = (
                deque([_Lease(step, 0, pieces)]),
                np.zeros(pieces, bool),
                pieces,
            )
            while missing:
                while left and free:
                    lease = self._next(left)
                    yield self.env.timeout(self.costs.message / 2)
                    heapq.heappop(free)[1].succeed(lease)
                    self._remind(lease)
                message = yield self.inbox.get()
                if isinstance(message, _Late):
                    late = message.lease
                    if late.step == step and not is_there[late.first : late.last].all():
                        self.again += 1
                        left.append(late._replace(time=late.time + 1))
                    continue
                heapq.heappush(free, (message.number, message.wakes))
                if message.lease is None:
                    continue
                yield self.env.timeout(self.costs.message / 2)
                answered, seconds = message.lease, message.seconds
                if answered.step == step:
                    new = int(np.count_nonzero(~is_there[answered.first : answered.last]))
                    is_there[answered.first : answered.last] = True
                    missing -= new
                    self.useful += seconds * new / (answered.last - answered.first)
            # The head's own replica makes the step, too, before it gives work again.
            yield self.env.timeout(self.costs.record + self.replay)
            self.step = step + 1

    def _next(self, left: deque[_Lease]) -> _Lease:
        """The next lease, of pieces that nobody has; a late one is given as it was."""
        first = left.popleft()
        if first.time > 1:
            return first
        count = first.last - first.first
        size = min(max(math.ceil(count * self.plan.share / self.plan.workers), 1), count)
        if size < count:
            left.appendleft(first._replace(first=first.first + size))
        return first._replace(last=first.first + size)

    def _remind(self, lease: _Lease) -> None:
        """Tell the head when a lease has been out for too long."""
        usual = (lease.last - lease.first) * self.piece + self.replay + self.costs.latency
        out = self.env.timeout(usual * self.plan.patience)
        out.callbacks.append(lambda event: self.inbox.put(_Late(lease)))

    def _worker(self, number: int, is_new: bool) -> _Steps:
        costs, env, wakes = self.costs, self.env, self.env.event()
        known = 0
        if is_new:
            yield env.timeout(costs.start)
            begin = env.now
            yield env.timeout(costs.load)
            every = self.plan.checkpoint_every
            known = self.step // every * every
            while known < self.step:
                behind, known = self.step - known, self.step
                yield env.timeout(behind * self.replay)
            self.catch_ups.append(env.now - begin)
        speed = costs.slower if self.rng.random() < costs.slow else 1.0
        dies = env.now + self.rng.exponential(costs.lifetime * 3600)
        self.inbox.put(_Free(number, wakes))
        while True:
            lease = yield wakes
            pieces = lease.last - lease.first
            work = pieces * self.piece * speed * math.exp(costs.spread * self.rng.normal())
            seconds = (lease.step - known) * self.replay * speed + work
            known = lease.step
            if env.now + seconds >= dies:
                alive = max(0.0, dies - env.now)
                self.worked += alive
                yield env.timeout(alive)
                break
            yield env.timeout(seconds + costs.latency)
            self.worked += seconds
            wakes = env.event()
            self.inbox.put(_Free(number, wakes, lease, seconds))
        self.hired += 1
        env.process(self._worker(self.hired, is_new=True))

"""The head of an elastic run: it gives leases, enters answers, and writes the log.

What it must not lose is the log, and it keeps nothing else: killed and started again, it makes the
codes again from the newest checkpoint and the log, and goes on. It evaluates no loss itself.
"""

import errno
import time
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from tqdm import tqdm

from experiments.cluster import code_digest
from experiments.command import say, whole
from experiments.elastic.checkpoints import Checkpoints
from experiments.elastic.config import Config
from experiments.elastic.crew import Crew, Member
from experiments.elastic.leases import Answer, Round
from experiments.elastic.log import Log, Record
from experiments.elastic.replica import Replica
from experiments.elastic.worker import Greeting, Start
from experiments.store import changed

__all__ = ["Head"]

_SAYS_EVERY = 10.0  # seconds between two words about a wait
_FAILURES = 3  # errors of workers, without a step between them, that end the run
_PAUSE = 5.0  # seconds after an error before another worker is asked for
_FAR = 20  # steps: a worker further behind follows first, and is given work then


class Head:
    """A run, from where its log ends.

    Args:
      config: who makes it, and where it is kept.
      replica: of the task, at step 0.

    Raises:
      ValueError: the log is of another run, or damaged, or does not make the codes that it says.
    """

    def __init__(self, config: Config, replica: Replica) -> None:
        self.config, self.replica = config, replica
        self.log, self.checkpoints = Log(config.log), Checkpoints(config.log)
        task = replica.task
        begins, self.records = self.log.read()
        self._begins = {"run": task.depends_on, "code": code_digest()}
        self.is_new = not begins
        if words := changed(begins["run"], task.depends_on) if begins else "":
            raise ValueError(f"log: {config.log} has a run with {words}: name another file.")
        if begins and begins["code"] != self._begins["code"]:
            say(
                f"{config.log} was begun with another version of the code or of JAX: the run goes "
                "on, and ends where hashes say that codes are others"
            )
        self._hashes = {x.step: x.hash for x in self.records if x.hash}
        self._newest = self.checkpoints.newest(min(len(self.records), task.steps))
        self._alone = self._said = 0.0  # since when there has been no worker, and it was said
        self._failures = 0
        self.expelled: dict[str, str] = {}
        self.wasted = 0

    def catch_up(self, progress: bool = True) -> None:
        """Make the codes of the log's last step; the newest checkpoint is the begin."""
        if self._newest is not None:
            self.replica.restore(*self._newest)
            if self.replica.step in self._hashes:
                self.replica.hashes[self.replica.step] = self.replica.digest()
                self._check_own()
        steps = self.records[self.replica.step : self.replica.task.steps]
        bar = tqdm(steps, "replaying the log", unit="step", disable=not progress or not steps)
        for record in bar:
            self.replica.follow([record])
            self._check_own()

    def _check_own(self) -> None:
        """Refuse to go on from codes that are not those of the log."""
        for step, found in self.replica.hashes.items():
            if self._hashes.setdefault(step, found) != found:
                raise ValueError(
                    f"log: {self.config.log} says that the codes before step {step} have the hash "
                    f"{self._hashes[step]}, and here they have {found}: the code, JAX or the "
                    "machine is another, or the checkpoint beside it is of another run."
                )
        self.replica.hashes = {}

    def run(self, crew: Crew | None, progress: bool = True) -> None:
        """All steps that are left, by a crew where there are any. A stop waits for a step's end."""
        steps, replica = self.replica.task.steps, self.replica
        if self.is_new:
            self._written(lambda: self.log.begin(self._begins))
            self.is_new = False
        bar = tqdm(total=steps, initial=replica.step, unit="step", disable=not progress)
        with bar:
            self._alone = self._said = time.monotonic()
            while replica.step < steps:
                loss = self.step(crew)
                bar.update()
                bar.set_postfix_str(f"{len(crew.present)} workers, loss {loss:.3f}", refresh=False)
        self._keep()

    def step(self, crew: Crew) -> float:
        """One step; the mean loss of its queries."""
        replica = self.replica
        found = self._found(crew, "losses")
        groups = found.reshape(len(replica.pieces), replica.parts, *found.shape[1:])
        count = int(replica.pieces.max()) + 1
        losses = _whole(replica.mean(groups)[:count])
        look = None
        if replica.wants_look(losses):
            look = _whole(replica.mean_look(self._found(crew, "look", losses)))
        now = replica.step
        record = Record(
            now,
            replica.key,
            (0, count),
            (0, replica.parts),
            losses,
            look,
            self._hashes.get(now, ""),
        )
        with whole("this step"):
            self._written(lambda: self.log.append(record))
            self.records.append(record)
            replica.follow([record])
            self._check_own()
            if replica.step % self.config.checkpoint_every == 0:
                self._keep()
        self._failures = 0
        return float(losses.mean())

    def _keep(self) -> None:
        """Write a checkpoint of this step."""
        if self._newest is not None and self._newest.step == self.replica.step:
            return
        self._newest = Start(self.replica.step, self.replica.arrays())
        self._written(lambda: self.checkpoints.write(self._newest))

    def _written(self, write: Any) -> None:
        """Write something; where the disk is full, once it is not."""
        said = 0.0
        while True:
            try:
                return write()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if time.monotonic() - said > _SAYS_EVERY:
                    said = time.monotonic()
                    say(f"\nlog: {self.config.log}: {error.strerror}: waiting for room")
                time.sleep(0.5)

    def _found(self, crew: Crew, kind: str, losses: np.ndarray | None = None) -> np.ndarray:
        """What workers find of all pieces of a round."""
        pieces, shape = self.replica.shape(kind)
        began = time.monotonic()
        one = Round(self.replica.step, kind, pieces, shape, self.config.lease_seconds, began)
        while not one.is_complete:
            self._give(crew, one, losses)
            for member, answer in crew.events(min(one.until(time.monotonic()), 1.0)):
                self._hear(crew, one, member, answer)
            for member in crew.overdue():
                self._lose(crew, one, member, "it has not answered")
            crew.hire()
            self._wait(crew, one)
        self.wasted += one.wasted
        return one.found

    def _give(self, crew: Crew, one: Round, losses: np.ndarray | None) -> None:
        """Give work to those that wait for it."""
        now, known = time.monotonic(), len(self.records)
        idle = [member for member in crew.present if member.is_idle]
        near = [member for member in idle if known - member.has <= _FAR]
        shares = len(crew.present) / self.config.share
        for member in near:
            alone = len(crew.members) == 1 or now - one.began > self.config.lost_seconds
            lease = one.lease(member.name, shares, now, alone)
            if lease is not None:
                crew.send(member, self.records[member.has :], lease, losses)
        for member in idle:
            behind = known - member.has
            if member.is_idle and behind >= min(_FAR, self.config.hash_every):
                crew.send(member, self.records[member.has :], None)

    def _hear(self, crew: Crew, one: Round, member: Member, answer: Any) -> None:
        """Whatever came of a call."""
        if isinstance(answer, Greeting):
            self._admit(crew, member, answer)
        elif isinstance(answer, Answer):
            for step, found in answer.hashes.items():
                if self._hashes.get(step, found) != found:
                    return self._expel(
                        crew,
                        one,
                        member,
                        f"its codes before step {step} have the hash {found} "
                        f"instead of {self._hashes[step]}",
                    )
            for name, why in one.enter(member.name, answer).items():
                if name in crew.members:
                    self._expel(crew, one, crew.members[name], why)
        elif answer is not None:
            self._lose(crew, one, member, answer)

    def _admit(self, crew: Crew, member: Member, greeting: Greeting) -> None:
        """Take a newcomer, if it is of this run."""
        member.where = f"process {greeting.process} on {greeting.host}"
        if words := changed(greeting.depends_on, self.replica.task.depends_on):
            return self._expel(crew, None, member, f"it has {words}")
        if greeting.versions != code_digest():
            return self._expel(
                crew, None, member, "it has another version of the code or of JAX than the head"
            )
        step = 0 if self._newest is None else self._newest.step
        say(f"\n{member.name} is there ({member.where}), and begins at step {step}")
        crew.admit(member, self._newest, step)

    def _expel(self, crew: Crew, one: Round | None, member: Member, why: str) -> None:
        """Let a worker go that is not of this run, and have no other in its place."""
        self.expelled[member.name] = why
        say(f"\n{member.name} ({member.where}) is expelled: {why}")
        crew.wanted -= 1
        self._drop(crew, one, member)
        if not crew.wanted:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.expelled.items())
            raise RuntimeError(f"workers: all were expelled: {reasons}.")

    def _lose(self, crew: Crew, one: Round, member: Member, why: Any) -> None:
        """A worker is gone; another takes its place."""
        self._drop(crew, one, member)
        words = "it was killed, or its machine is gone"
        if not isinstance(why, RayActorError):
            words = str(why).strip().splitlines()[-1].strip()
            self._failures += 1
            crew.not_before = time.monotonic() + _PAUSE
        where = f" ({member.where})" if member.where else ""
        say(f"\n{member.name}{where} is lost, another is asked for: {words}")
        if self._failures >= _FAILURES:
            raise RuntimeError(f"workers: {_FAILURES} failed, and no step was made: {words}")

    def _drop(self, crew: Crew, one: Round | None, member: Member) -> None:
        crew.drop(member)
        if one is not None:
            one.forget(member.name)

    def _wait(self, crew: Crew, one: Round) -> None:
        """Say what is waited for.

        Raises:
          ConnectionError: no worker has come in time.
        """
        now = time.monotonic()
        if crew.present:
            self._alone = now
            if now - max(self._said, one.began) > _SAYS_EVERY and one.doubts:
                self._said = now
                say(f"\nwaiting for another worker, step {one.step}: {one.doubts}")
            return
        waits = now - self._alone
        if waits > self.config.join_seconds:
            raise ConnectionError(f"workers: none has come in {waits:.0f} seconds: {crew.room()}.")
        if now - max(self._said, self._alone) > _SAYS_EVERY:
            self._said = now
            say(f"\nwaiting for a worker, {waits:.0f} seconds: {crew.room()}")


def _whole(losses: Any) -> np.ndarray:
    """Losses as they are read again from the log: of what is not finite one NaN."""
    found = np.asarray(losses)
    return np.where(np.isfinite(found), found, np.float32(np.nan))

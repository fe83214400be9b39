"""Who evaluates which pieces of a step, and which answers enter it.

A piece is `query_batch` queries on one part of the batch; a lease is some pieces that follow each
other, given to one worker for a time. This file knows no transport and no clock: the head tells it
both, so all that may happen to an answer is tried by tests without a cluster.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Answer", "Lease", "Round"]


class Lease(NamedTuple):
    """Work for one worker: the pieces `first`, ..., `last - 1` of a round."""

    step: int
    kind: str  # "losses" or "look"
    first: int
    last: int


class Answer(NamedTuple):
    """What a worker found.

    Attributes:
      lease: which it answers.
      found: float32 (pieces, ...).
      hashes: of its codes before some steps, by the step.
      step: the step that it is before.
    """

    lease: Lease | None
    found: np.ndarray | None = None
    hashes: dict[int, str] = {}  # noqa: RUF012 - never changed
    step: int = 0


@dataclasses.dataclass
class _Given:
    worker: str
    lease: Lease
    until: float
    alone: bool


class Round:
    """The pieces of a step that are evaluated side by side.

    Args:
      step: the step's number.
      kind: what is evaluated.
      pieces: how many.
      shape: of what is found of a piece.
      seconds: after which a lease may go to another worker, too.
      began: when.

    Example:
      >>> one = Round(7, "losses", 4, (1, 2), seconds=10.0)
      >>> first = one.lease("a", 2, now=0.0)
      >>> second = one.lease("b", 1, now=0.0)
      >>> (first.first, first.last), (second.first, second.last), one.lease("c", 1, now=5.0)
      ((0, 2), (2, 4), None)
      >>> one.lease("c", 1, now=11.0) == first
      True
      >>> found = np.zeros((2, 1, 2), np.float32)
      >>> one.enter("c", Answer(first, found)), one.enter("a", Answer(first, found)), one.wasted
      ({}, {}, 2)
    """

    def __init__(
        self,
        step: int,
        kind: str,
        pieces: int,
        shape: Sequence[int],
        seconds: float,
        began: float = 0.0,
    ) -> None:
        self.step, self.kind, self._seconds, self.began = step, kind, seconds, began
        self.found = np.zeros((pieces, *shape), np.float32)
        self._is_there = np.zeros(pieces, bool)
        self._given: list[_Given] = []
        self._doubted: dict[int, tuple[str, np.ndarray]] = {}
        self.wasted = 0  # pieces that were evaluated in vain

    @property
    def is_complete(self) -> bool:
        """Whether all pieces are there."""
        return bool(self._is_there.all())

    @property
    def doubts(self) -> str:
        """Who found no finite numbers that another worker is to find, too, in words."""
        found = sorted({f"{who} found {_words(losses)}" for who, losses in self._doubted.values()})
        return ", ".join(found)

    def lease(self, worker: str, shares: float, now: float, alone: bool = False) -> Lease | None:
        """Work for a worker, or None where there is none.

        A share of the pieces that nobody has; where there are none, pieces whose time is over.

        Args:
          worker: its name.
          shares: into how many the pieces that nobody has are divided; at least one piece is given.
          now: seconds, of any clock that does not go back.
          alone: whether it may confirm by itself that a loss is no finite number.
        """
        free = ~self._is_there
        for given in self._given:
            free[given.lease.first : given.lease.last] = False
        for piece, (who, _) in self._doubted.items():  # another worker is to see them
            free[piece] &= alone or who != worker
        where = np.flatnonzero(free)
        if len(where):
            first, most = int(where[0]), math.ceil(len(where) / max(shares, 1))
            last = first + 1
            while last < min(first + most, len(free)) and free[last]:
                last += 1
        else:
            over = [x for x in self._open() if x.until <= now and x.worker != worker]
            if not over:
                return None
            old = min(over, key=lambda given: given.until)
            first, last = old.lease.first, old.lease.last
            old.until = now + self._seconds  # its pieces are with two workers now
        lease = Lease(self.step, self.kind, first, last)
        self._given.append(_Given(worker, lease, now + self._seconds, alone))
        return lease

    def until(self, now: float) -> float:
        """Seconds until the next lease's time is over."""
        return max(0.0, min((x.until for x in self._open()), default=now + self._seconds) - now)

    def _open(self) -> list[_Given]:
        """Leases that some piece is awaited from."""
        is_there = self._is_there
        return [x for x in self._given if not is_there[x.lease.first : x.lease.last].all()]

    def forget(self, worker: str) -> None:
        """Take a worker's leases back: it is gone."""
        self._given = [x for x in self._given if x.worker != worker]

    def enter(self, worker: str, answer: Answer) -> dict[str, str]:
        """Enter an answer, as far as its pieces are not there yet; of a closed step, none.

        Returns:
          Workers that gave an answer which no sound one gives, this one or another, and why it is
          none: it is not of its lease's shape; or a loss is no finite number, and is one where
          another worker evaluates it.
        """
        lease, found = answer.lease, answer.found
        if lease is None or (lease.step, lease.kind) != (self.step, self.kind):
            return {}
        count, shape = lease.last - lease.first, self.found.shape[1:]
        if not 0 <= lease.first < lease.last <= len(self.found):
            pieces = f"pieces {lease.first} to {lease.last} of {len(self.found)}"
            return {worker: f"it answers {pieces}, which are out of range"}
        known = [x for x in self._given if x.worker == worker and x.lease == lease]
        self._given = [x for x in self._given if x not in known]
        if not known:
            return {worker: "it answers what it was not asked"}
        if not isinstance(found, np.ndarray) or found.shape != (count, *shape):
            got = f"shape {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
            return {worker: f"its answer has {got} instead of shape {(count, *shape)}"}
        if found.dtype != np.float32:
            return {worker: f"its answer is of {found.dtype} instead of float32"}
        wrong: dict[str, str] = {}
        for piece, losses in enumerate(found, lease.first):
            if self._is_there[piece]:
                self.wasted += 1
            else:
                wrong |= self._enter(worker, piece, losses, known[0].alone)
        return wrong

    def _enter(self, worker: str, piece: int, losses: np.ndarray, alone: bool) -> dict[str, str]:
        """Enter a piece; a loss that is not finite only where two workers say so."""
        is_finite, doubted = np.isfinite(losses), self._doubted.get(piece)
        is_second = doubted is not None and (alone or doubted[0] != worker)
        agree = is_second and (np.isfinite(doubted[1]) == is_finite).all()
        if not is_finite.all() and not agree:
            if doubted is None or is_second:
                self._doubted[piece] = worker, losses
            return {}
        self._doubted.pop(piece, None)
        self.found[piece] = np.where(is_finite, losses, np.float32(np.nan))
        self._is_there[piece] = True
        if agree or doubted is None or doubted[0] == worker:
            return {}
        words = f"it found {_words(doubted[1])} where {worker} found {_words(losses)}"
        return {doubted[0]: words}


def _words(losses: np.ndarray) -> str:
    return " and ".join(f"{x:.4g}" for x in losses.ravel())

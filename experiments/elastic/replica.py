"""A replica of a run: codes that follow the log, and what a worker is asked about them."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import zoqo_jax as zq
from experiments.cluster import digest
from experiments.elastic.leases import Lease
from experiments.elastic.log import Record
from experiments.elastic.task import Task
from experiments.finetune.programs import programs
from experiments.leaves import as_arrays, like

__all__ = ["Replica"]


class Replica:
    """The codes of a run before a step, and the optimizer's state.

    Every step is made by one program, also where a log is replayed: another one, of many steps at
    once, might round a size otherwise.

    Args:
      task: what is trained; its parameters' memory is taken.
      hash_every: steps between hashes.

    Attributes:
      step: the number of the next step.
      hashes: of the codes before some steps that were passed, by the step.
      pieces: int32 (groups, together), numbers of the queries that are evaluated at once.
    """

    def __init__(self, task: Task, hash_every: int) -> None:
        self.task, self.hash_every, self.step = task, hash_every, 0
        self.hashes: dict[int, str] = {}
        remote = zq.distributed.Remote(task.tx, task.value_fn, task.parts)
        state = task.tx.init(task.params)
        self.pieces = remote.pieces(task.params)
        self.key: tuple[int, int] = tuple(
            int(x) for x in jax.random.key_data(optax.tree.get(state, "key")).ravel()
        )
        self.is_sized = bool(optax.tree.get(state, "sizes", ()))
        trained, self._rest = task.split(task.params)
        self._trained = jax.tree.map(jnp.array, trained)  # copies, that steps may write over
        self._state = state

        def program(fn: Any, donate: tuple[int, ...] = ()) -> Any:
            @functools.partial(programs, donate=donate)
            def run(trained: Any, state: Any, rest: Any, *given: Any) -> Any:
                return fn(task.join(trained, rest), state, *given)

            return run

        def step(params: Any, state: Any, losses: Any, look: Any) -> Any:
            params, state = remote.step(params, state, losses, look)
            return task.split(params)[0], state

        self._step = program(step, donate=(0, 1))
        self._losses, self._look = program(remote.losses), program(remote.look)
        self._wants_look = program(remote.wants_look)
        self.mean, self.mean_look = map(jax.jit, (remote.mean, remote.mean_look))

    @property
    def parts(self) -> int:
        """How many parts a batch has."""
        return self.task.parts or 1

    @property
    def params(self) -> Any:
        """The parameters."""
        return self.task.join(self._trained, self._rest)

    def shape(self, kind: str) -> tuple[int, tuple[int, ...]]:
        """How many pieces a round of this kind has, and the shape of what is found of one."""
        if kind == "look":
            return self.parts, (2,)
        return len(self.pieces) * self.parts, (self.pieces.shape[1], 2)

    def evaluate(self, lease: Lease, losses: np.ndarray | None = None) -> np.ndarray:
        """What is found of a lease's pieces, float32 (pieces, ...).

        Args:
          lease: of this step.
          losses: of the step's queries, where the lease is for a look.
        """
        found = []
        for piece in range(lease.first, lease.last):
            group, part = divmod(piece, self.parts)
            examples = self.task.part(self.step, part)
            given = () if examples is None else (examples,)
            if lease.kind == "look":
                found.append(self._asked(self._look, losses, *given))
            else:
                found.append(self._asked(self._losses, self.pieces[group], *given))
        return np.stack([np.asarray(x) for x in found])

    def wants_look(self, losses: np.ndarray) -> bool:
        """Whether the step wants the losses before and after it."""
        return self.is_sized and bool(self._asked(self._wants_look, losses))

    def follow(self, records: Iterable[Record]) -> None:
        """Make the steps of the log; those that are made already are left out.

        Raises:
          ValueError: a record is not of the next step, or of another run's key.
        """
        for record in records:
            if record.step < self.step:
                continue
            if record.step > self.step or tuple(record.key) != self.key:
                raise ValueError(
                    f"a record of step {record.step} and key {tuple(record.key)} is not of the "
                    f"next step, {self.step}, of the run with the key {self.key}."
                )
            look = np.zeros(2, np.float32) if record.look is None else record.look
            self._trained, self._state = self._asked(self._step, record.losses, look)
            self.step += 1
            if self.step % self.hash_every == 0:
                self.hashes[self.step] = self.digest()

    def _asked(self, program: Any, *given: Any) -> Any:
        """What a program makes of the codes."""
        return program(self._trained, self._state, self._rest, *given)

    def digest(self) -> str:
        """A hash of the codes and of the state that the next step depends on."""
        return digest((self._trained, self._state))

    def arrays(self) -> list[np.ndarray]:
        """What `restore` needs, copies."""
        return [np.array(x) for x in as_arrays((self._trained, self._state))]

    def restore(self, step: int, arrays: list[np.ndarray]) -> None:
        """Take the place of the replica that these `arrays` are of.

        Raises:
          ValueError: they are of another run's shapes.
        """
        self._trained, self._state = like((self._trained, self._state), arrays)
        self.step, self.hashes = step, {}

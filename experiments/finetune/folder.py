"""A run's folder: its settings, its checkpoints, and what it measured.

`config.json` says whose folder it is. A checkpoint holds all that changes, the bytes of codes or
floats and the optimizer's state, so that a run goes on from the last one bit for bit. That of the
step which answered the dev examples best stays beside the last one, so that it takes no memory.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.cluster import here
from experiments.command import whole
from experiments.files import claimed, plain, read_json, writable, write_json
from experiments.finetune.config import LENGTH, Config
from experiments.finetune.objective import Scores
from experiments.leaves import as_arrays, like
from experiments.store import changed, defaults

__all__ = ["Folder", "Guest", "Progress"]


class Progress(NamedTuple):
    """How far a run is: the content of a checkpoint."""

    step: int
    trained: list[jax.Array]  # the arrays that change
    state: Any  # the optimizer's
    log: np.ndarray  # float32 (steps, queries), written up to `step`
    history: list[dict[str, float]]  # a line for each look at the dev examples
    last: dict[str, float]  # the last step's loss and seconds

    @property
    def best_step(self) -> int:
        """The step that answered the dev examples best, or 0."""
        return int(max(self.history, key=_merit)["step"]) if self.history else 0

    @property
    def best_accuracy(self) -> float:
        """The share of the dev examples that it answered right."""
        return max(map(_merit, self.history), default=(0.0, 0.0))[0]

    @property
    def facts(self) -> dict[str, Any]:
        """What is no array, of JSON's kinds."""
        return {"step": self.step, "history": self.history, "last": self.last}

    def arrays(self) -> dict[str, Any]:
        """The arrays, NumPy's, in lists; keys as their words."""
        found = {"trained": as_arrays(here(self.trained)), "state": as_arrays(here(self.state))}
        return {**found, "log": self.log}

    def of(self, arrays: dict[str, Any], facts: dict[str, Any]) -> "Progress":
        """The progress whose `arrays` and `facts` these are; its state has the form of this one's.

        Example:
          >>> start = Progress(0, [jnp.ones(2)], (jax.random.key(3),), np.zeros(1), [], {})
          >>> again = start.of(start.arrays(), {**start.facts, "step": 5})
          >>> again.step, bool(again.state[0] == start.state[0])
          (5, True)
        """
        return Progress(
            trained=[jnp.array(x) for x in arrays["trained"]],
            state=like(self.state, arrays["state"]),
            log=np.array(arrays["log"]),
            **facts,
        )


class Folder:
    """The folder of a run, which no other process writes to inside of its `with` block.

    Args:
      config: the run's settings.

    Raises:
      ValueError: another run writes to it, it has a run with other settings or other files, or it
        cannot be written to.
    """

    def __init__(self, config: Config) -> None:
        self.path, self._steps = Path(config.output), config.steps
        self._settings, self._usual = plain(dataclasses.asdict(config)), defaults(config)
        self._cache, self._exits, self._goes_on = config.cache, ExitStack(), config.goes_on
        self._without_places = config.without_places
        self.scratch = self.path  # for what may be made again

    @property
    def settings(self) -> str:
        """What processes of one run must all be given, as text; where things lie may differ."""
        # Where there is a cache, frozen layers read all examples; else the run's, in its order.
        return json.dumps({**self._without_places, "cache": bool(self._cache)}, sort_keys=True)

    def __enter__(self) -> "Folder":
        other = self._other()
        with ExitStack() as exits:
            # Tables put the scores there that runs of one model begin with.
            ours = {"before.json"}.__contains__ if not other else bool
            exits.enter_context(claimed("output", self.path, ours))
            if self._cache:
                writable("cache", Path(self._cache) / "states")
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exits.close()

    def begin(self) -> None:
        """Write the settings; a run writes nothing before."""
        write_json(self.path / "config.json", self._settings)

    def where(self) -> str:
        """The step from which a run goes on that begins now, in words."""
        found = (self.path / "checkpoints").glob("*")
        steps = [int(path.name) for path in found if path.name.isdigit()]
        if not steps:
            return "no step is kept yet: begins at step 0"
        return f"goes on from step {max(steps)} of {self._steps}, kept in {self.path}/checkpoints"

    def _other(self) -> dict[str, Any]:
        """The settings of the run that is there, which must be this one's."""
        try:
            other = read_json(self.path / "config.json")
        except ValueError as error:
            raise ValueError(f"output: {error}") from None
        if other and not {"method", "train", "steps"} <= other.keys():
            raise ValueError(
                f"output: {self.path} holds other things, such as 'config.json': name a new or an "
                "empty folder."
            )
        free = ("output", *(LENGTH if self._goes_on else ()))  # a folder may be moved
        here = {**other, **{name: self._settings[name] for name in free}}
        if other and (words := changed(here, self._settings, self._usual)):
            raise ValueError(
                f"output: {self.path} holds a run with {words}: name another folder, or delete "
                "this one."
            )
        return other

    def once(self, name: str, measure: Callable[[], Scores]) -> Scores:
        """Scores that were measured before, or are measured and written now."""
        path = self.path / f"{name}.json"
        if not path.is_file():
            write_json(path, measure()._asdict())
        return Scores(**read_json(path))

    def write_history(self, lines: list[dict[str, float]], mode: str = "w") -> None:
        """Write what was measured on the way, or add to it (mode "a"), a line each."""
        with (self.path / "metrics.jsonl").open(mode) as file:
            file.writelines(f"{json.dumps(line)}\n" for line in lines)

    @contextmanager
    def checkpoints(self) -> Iterator["_Checkpoints"]:
        """The run's checkpoints."""
        alone = ocp.options.MultiprocessingOptions(
            primary_host=0,
            active_processes={0},  # the others need not come along
            barrier_sync_key_prefix="process-0",
        )
        options = ocp.CheckpointManagerOptions(
            create=False, enable_async_checkpointing=False, multiprocessing_options=alone
        )
        folder = (self.path / "checkpoints").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with ocp.CheckpointManager(folder, options=options) as manager:
            yield _Checkpoints(manager)


class Guest(Folder):
    """What stands in a process's folder's place that writes nothing, as process 0 does it.

    Args:
      config: the run's settings.
    """

    def __enter__(self) -> "Guest":
        scratch = self._exits.enter_context(tempfile.TemporaryDirectory(prefix="finetune-"))
        self.scratch = Path(scratch)
        return self

    def begin(self) -> None:
        """Nothing is written."""

    def where(self) -> str:
        """From which step the run goes on is for process 0 to say."""
        return "process 0 keeps the run"

    def write_history(self, lines: list[dict[str, float]], mode: str = "w") -> None:
        """Nothing is written."""

    @contextmanager
    def checkpoints(self) -> Iterator["_Checkpoints"]:
        """None are read or written."""
        yield _Checkpoints(None)


class _Checkpoints:
    """A run's checkpoints: the last one, and that of the best step."""

    def __init__(self, manager: ocp.CheckpointManager | None) -> None:
        self._manager = manager  # None where another process has them

    def last(self, start: Progress) -> Progress:
        """The progress in the last checkpoint, or the start."""
        step = None if self._manager is None else self._manager.latest_step()
        return start if step is None else self._read(step, start)

    def best(self, now: Progress, shapes: list[jax.ShapeDtypeStruct]) -> list[jax.Array]:
        """What trains as it was at the best step."""
        blank = [np.empty(one.shape, one.dtype) for one in shapes]
        return self._read(now.best_step, now._replace(trained=blank)).trained

    def _read(self, step: int, like: Progress) -> Progress:
        known = np.zeros((step, *like.log.shape[1:]), np.float32)
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardRestore({**like.arrays(), "log": known}),
                facts=ocp.args.JsonRestore(),
            ),
        )
        unknown = np.zeros_like(like.log[step:])
        found["arrays"]["log"] = np.concatenate([found["arrays"]["log"], unknown])
        return like.of(found["arrays"], found["facts"])

    def write(self, now: Progress) -> None:
        """Write a checkpoint, unless this step has one, and delete those that are older."""
        if self._manager is None:
            return
        if self._manager.latest_step() == now.step or any(x.is_deleted() for x in now.trained):
            return  # a step that was stopped had taken the memory of what trains
        with whole("the checkpoint"):
            self._manager.save(
                now.step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave({**now.arrays(), "log": now.log[: now.step]}),
                    facts=ocp.args.JsonSave(now.facts),
                ),
            )
            for step in set(self._manager.all_steps()) - {now.step, now.best_step}:
                self._manager.delete(step)


def _merit(line: dict[str, float]) -> tuple[float, float]:
    """What the best step has most of: right answers, and among as many the lower loss."""
    return line["dev_accuracy"], -line["dev_loss"]

"""What a run keeps in its folder while it goes on: its settings, checkpoints, and what it measured.

`config.json` says whose folder it is. Checkpoints hold all that changes, the bytes of codes or
floats and the optimizer's state, so that a run goes on from the last one bit for bit.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.files import plain, read_json, write_json
from experiments.finetune.config import Config
from experiments.finetune.objective import Scores

__all__ = ["Folder", "Progress"]


class Progress(NamedTuple):
    """Where a run is: what a checkpoint holds."""

    step: int
    trained: list[jax.Array]  # the arrays that change
    state: Any  # the optimizer's
    best: list[np.ndarray]  # `trained` at `best_step`
    best_step: int
    best_score: float  # accuracy on the dev examples
    log: np.ndarray  # float32 (steps, queries), written up to `step`
    history: list[dict[str, float]]


class Folder:
    """The folder of a run.

    Args:
      config: the run's settings.

    Raises:
      ValueError: a run with other settings is there.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.output)
        path = self.path / "config.json"
        settings = plain(dataclasses.asdict(config))
        if other := read_json(path):
            changed = [key for key in settings if other.get(key) != settings[key]]
            changed = [key for key in changed if key != "output"]
            if changed:
                raise ValueError(
                    f"output: {self.path} holds a run with another {changed[0]}, "
                    f"{other.get(changed[0])!r} instead of {settings[changed[0]]!r}: name another "
                    "folder, or delete this one."
                )
        write_json(path, settings)

    def once(self, name: str, measure: Callable[[], Scores]) -> Scores:
        """Scores that were measured before, or are measured now and kept."""
        path = self.path / f"{name}.json"
        if path.is_file():
            return Scores(**json.loads(path.read_text()))
        scores = measure()
        write_json(path, scores._asdict())
        return scores

    def write_history(self, lines: list[dict[str, float]], mode: str = "w") -> None:
        """Write what was measured on the way, or add to it (mode "a"), a line each."""
        with (self.path / "metrics.jsonl").open(mode) as file:
            file.writelines(f"{json.dumps(line)}\n" for line in lines)

    @contextmanager
    def checkpoints(self) -> Iterator["_Checkpoints"]:
        """The run's checkpoints; the last one is whole when the block ends well."""
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        folder = (self.path / "checkpoints").resolve()
        with ocp.CheckpointManager(folder, options=options) as manager:
            yield _Checkpoints(manager)
            manager.wait_until_finished()


class _Checkpoints:
    """A run's checkpoints, of which the last is kept."""

    _FACTS = ("step", "best_step", "best_score", "history")

    def __init__(self, manager: ocp.CheckpointManager) -> None:
        self._manager = manager

    def last(self, start: Progress) -> Progress:
        """Where the last checkpoint was, or the start."""
        step = self._manager.latest_step()
        if step is None:
            return start
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardRestore(_arrays(start)), facts=ocp.args.JsonRestore()
            ),
        )
        arrays = found["arrays"]
        typed = [
            jax.random.wrap_key_data(jnp.asarray(x)) if _is_key(like) else jnp.asarray(x)
            for x, like in zip(arrays["state"], jax.tree.leaves(start.state), strict=True)
        ]
        return Progress(
            trained=[jnp.array(x) for x in arrays["trained"]],
            state=jax.tree.unflatten(jax.tree.structure(start.state), typed),
            best=[np.array(x) for x in arrays["best"]],
            log=np.array(arrays["log"]),
            **found["facts"],
        )

    def keep(self, now: Progress) -> None:
        """Write a checkpoint, unless this step has one."""
        if self._manager.latest_step() == now.step:
            return
        facts = {name: getattr(now, name) for name in self._FACTS}
        self._manager.save(
            now.step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(_arrays(now)), facts=ocp.args.JsonSave(facts)
            ),
        )


def _arrays(now: Progress) -> dict[str, Any]:
    """The arrays of a checkpoint, in lists."""
    state = [jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(now.state)]
    lists = {"trained": now.trained, "best": now.best, "state": state}
    return {**{name: list(map(np.asarray, some)) for name, some in lists.items()}, "log": now.log}


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)

"""What a run needs beside its loop where several processes or devices share its steps.

All begin with process 0's progress, on all devices, and compare what they must have the same of:
code, settings, data and model before the first step, and codes on the way.
"""

from typing import Any

import jax

import zoqo_jax as zq
from experiments.cluster import Team, code_digest, digest, here
from experiments.finetune import data
from experiments.finetune.config import Config
from experiments.finetune.folder import Progress

__all__ = ["begin", "check_codes", "check_start", "on_all", "spread"]


def spread(tx: Any, config: Config, team: Team) -> tuple[Any, Any]:
    """A mesh and the transformation spread over it, or None and the one that was given.

    A step that has anything to divide is always made of the same pieces, also by one process.

    Raises:
      ValueError: there is nothing that several processes could divide.
    """
    if config.groups == config.parts == 1:
        if team.count > 1:
            raise ValueError(
                f"processes: a step of one group of queries and one part is nothing that "
                f"{team.count} can divide: give --num_queries or --parts."
            )
        return None, tx
    mesh = team.mesh(config.groups, config.parts)
    return mesh, zq.distributed.spread(tx, mesh, parts=config.parts)


def begin(start: Progress, mesh: Any, team: Team) -> Progress:
    """Process 0's progress on all devices, which is where it lies in every process then."""
    if _is_alone(mesh):
        return start
    flat, shape = jax.tree.flatten(start.arrays())
    arrays = jax.tree.unflatten(shape, team.arrays_from_first(flat))
    now = start.of(arrays, team.from_first(start.facts))
    return now._replace(trained=on_all(now.trained, mesh), state=on_all(now.state, mesh))


def on_all(tree: Any, mesh: Any) -> Any:
    """Arrays on all devices of a mesh; as they are where there is one device."""
    return tree if _is_alone(mesh) else zq.distributed.replicate(tree, mesh)


def check_start(team: Team, settings: str, tokens: dict[str, data.Tokens], params: Any) -> None:
    """Refuse processes that would each train another model.

    Args:
      team: the processes.
      settings: of the run, as text.
      tokens: examples, by their split.
      params: the model's.

    Raises:
      ValueError: they have not all the same; what differs is named, and in which process.
    """
    if team.count > 1:
        examples = [some.content for some in tokens.values()]
        digests = {"data": digest(examples), "model": digest(params)}
        team.check(code=code_digest(), settings=settings, **digests)


def check_codes(team: Team, now: Progress) -> None:
    """Refuse to go on where processes have come to have different codes.

    Raises:
      ValueError: they have; the step and the process are named.
    """
    if team.count > 1:
        team.check(**{f"codes after step {now.step}": digest(here(now.trained))})


def _is_alone(mesh: Any) -> bool:
    return mesh is None or mesh.size == 1

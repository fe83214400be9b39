"""What an elastic run trains: the same in every process, made of the same settings."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.cluster import digest
from experiments.elastic.config import Module

__all__ = ["Task", "of_module"]


class Task(NamedTuple):
    """A loss, parameters, and a transformation that moves them.

    Attributes:
      params: where the run begins.
      split: (params) -> the arrays that change, and the others.
      join: (arrays that change, others) -> params.
      tx: a transformation of zoqo_jax.
      value_fn: (params, part) -> the mean loss of the part's examples; without parts, (params).
      part: (step, number) -> a part of the step's batch, NumPy's arrays, or None.
      parts: how many a batch has, or None where `value_fn` knows its examples.
      steps: of the run.
      depends_on: what a run of this task depends on, by name, in JSON's kinds.
    """

    params: Any
    split: Callable[[Any], tuple[Any, Any]]
    join: Callable[[Any, Any], Any]
    tx: Any
    value_fn: Callable[..., Any]
    part: Callable[[int, int], Any]
    parts: int | None
    steps: int
    depends_on: dict[str, Any]


def of_module(config: Module) -> Task:
    """The task of a module that is given by name.

    Raises:
      ValueError: there is no such module, or it has not what a task needs.
    """
    try:
        found = importlib.import_module(config.module)
    except ImportError as error:
        raise ValueError(f"module: {config.module} cannot be imported: {error}.") from error
    for name in ("params", "tx", "value_fn"):
        if not hasattr(found, name):
            raise ValueError(f"module: {config.module} has no {name!r}.")
    batch = getattr(found, "batch", None)
    if batch is None and config.parts > 1:
        raise ValueError(
            f"parts must be 1, got {config.parts}: {config.module} has no 'batch' to divide."
        )

    def part(step: int, number: int) -> Any:
        if batch is None:
            return None
        return jax.tree.map(lambda x: rows(np.asarray(x), number), batch(step))

    def rows(x: np.ndarray, number: int) -> np.ndarray:
        if not x.ndim or len(x) % config.parts:
            raise ValueError(
                f"parts must divide the examples of a batch, an axis of arrays of shape {x.shape}, "
                f"got {config.parts}."
            )
        size = len(x) // config.parts
        return x[number * size : (number + 1) * size]

    first = {} if batch is None else {"data": digest(batch(0))}
    return Task(
        params=found.params,
        split=lambda params: (params, ()),
        join=lambda trained, rest: trained,
        tx=found.tx,
        value_fn=found.value_fn,
        part=part,
        parts=None if batch is None else config.parts,
        steps=config.steps,
        depends_on={
            "module": config.module,
            "parts": config.parts,
            "model": digest(found.params),
            **first,
        },
    )

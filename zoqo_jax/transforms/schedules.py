"""Numbers that may change with the step: learning rates and radii."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

__all__ = [
    "ONE",
    "Count",
    "Schedule",
    "check_count",
    "check_positive",
    "inverse_at",
    "is_traced",
    "value_at",
]

Schedule = float | int | Callable[[Any], Any] | Array
"""A number, traced or not, or an optax schedule: count -> number."""

Count = int | np.integer
"""How many of something: known when a step is compiled."""

ONE = np.int64(1)
"""The default of a count. `optax.inject_hyperparams` makes a traced array of a Python int."""


def value_at(schedule: Schedule, count: Array) -> Float32[Array, ""]:
    """A number, or a schedule's value at a step, as float32."""
    return jnp.asarray(schedule(count) if callable(schedule) else schedule, jnp.float32)


def inverse_at(schedule: Schedule, count: Array) -> Array | np.float32:
    """One over a number, or over a schedule's value at a step, as float32.

    A number's is made here, lest XLA, which knows it, multiply by an inverse where it says divide.
    """
    if callable(schedule) or isinstance(schedule, Array):
        return 1.0 / value_at(schedule, count)
    return np.float32(1.0) / np.float32(schedule)


def check_positive(name: str, value: Schedule) -> None:
    """Refuse numbers that are not positive and finite; schedules and traced ones are trusted."""
    if callable(value) or is_traced(value):
        return
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}.")


def check_count(name: str, value: Any, *, or_none: bool = False) -> None:
    """Refuse what is no whole number of at least one.

    Examples:
        >>> check_count("num_queries", 0)
        Traceback (most recent call last):
        ValueError: num_queries must be at least 1, got 0.
    """
    if value is None and or_none:
        return
    none = " or None" if or_none else ""
    if isinstance(value, Array):
        raise ValueError(
            f"{name} must be an int{none}, got an array: name it in static_args where "
            f"optax.inject_hyperparams is around it, as in static_args=({name!r},)."
        )
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise ValueError(f"{name} must be an int{none}, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1{none}, got {value}.")


def is_traced(value: Any) -> bool:
    """Whether a number is not known while a step is traced."""
    return isinstance(value, jax.core.Tracer)

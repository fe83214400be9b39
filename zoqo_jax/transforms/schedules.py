"""Numbers that may change with the step: learning rates and radii."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

__all__ = ["Schedule", "check_positive", "inverse_at", "value_at"]

Schedule = float | int | Callable[[Any], Any]


def value_at(schedule: Schedule, count: Array) -> Float32[Array, ""]:
    """A number, or a schedule's value at a step, as float32."""
    return jnp.asarray(schedule(count) if callable(schedule) else schedule, jnp.float32)


def inverse_at(schedule: Schedule, count: Array) -> Array | np.float32:
    """One over a number, or over a schedule's value at a step, as float32.

    A number's is made here, lest XLA, which knows it, multiply by an inverse where it says divide.
    """
    if callable(schedule):
        return 1.0 / value_at(schedule, count)
    return np.float32(1.0) / np.float32(schedule)


def check_positive(name: str, value: Schedule) -> None:
    """Refuse numbers that are not positive and finite; schedules are trusted."""
    if not callable(value) and not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}.")

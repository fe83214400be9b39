"""Descent along real-valued directions rounded at random: what `quzo` and `qes` share."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import numpy as np
from jaxtyping import Array, Float

from zoqo_jax import directions
from zoqo_jax.directions import Boundary, Direction, Structure
from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.transforms.schedules import (
    Count,
    Schedule,
    inverse_at,
    value_at,
)
from zoqo_jax.transforms.sizing import Sizing
from zoqo_jax.transforms.state import State
from zoqo_jax.transforms.stepping import Method

__all__ = ["Noise", "RoundedDescent"]

Noise = Literal["gaussian", "rademacher"]


@dataclasses.dataclass(frozen=True)
class RoundedDescent(Method):
    """A method that probes n +- Q(mu u); the fields are arguments of its factory."""

    learning_rate: Schedule
    radius: Schedule
    num_queries: Count
    noise: Noise
    structure: Structure
    density: Schedule | Array
    boundary: Boundary
    sizing: Sizing | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        directions.check_choice("noise", self.noise, get_args(Noise))
        directions.check(self.noise, self.structure, self.boundary, self.density)

    def direction(
        self, key: Array, array: QuantizedArray, count: Array, size: Array | None = None
    ) -> Direction:
        """See `Method`: Q(mu u)."""
        return directions.describe(
            key,
            array,
            distribution=self.noise,
            structure=self.structure,
            boundary=self.boundary,
            **self.lengths(array, count, size, self.density, radius=value_at(self.radius, count)),
            rounded=True,
        )

    def length(self, step: State, direction_sum: Array) -> Float[Array, "..."]:
        """-eta g in codes, g = (l+ - l-) / (2 mu^2) Q(mu u) on average over queries."""
        if self.sizing is not None:
            return -direction_sum
        inverse = inverse_at(self.radius, step.count)
        mean = np.float32(0.5 / self.num_queries) * inverse * inverse
        return -(value_at(self.learning_rate, step.count) * mean) * direction_sum

"""Descent along real-valued directions rounded at random: what `quzo` and `qes` share."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from zoqo_jax import stencils
from zoqo_jax.arrays import QuantizedArray
from zoqo_jax.stencils import Boundary, Stencil, Structure
from zoqo_jax.transforms.schedules import Schedule, check_positive, inverse_at, value_at
from zoqo_jax.transforms.state import StepState

__all__ = ["Noise", "RoundedDescent", "weigh"]

Noise = Literal["gaussian", "rademacher"]


class RoundedDescent(NamedTuple):
    """The arguments of a method that probes n +- Q(mu u)."""

    learning_rate: Schedule
    radius: Schedule
    num_queries: int
    noise: Noise
    structure: Structure
    density: Schedule | Array
    boundary: Boundary

    def check(self) -> None:
        """Refuse arguments that no such method can have."""
        check_positive("learning_rate", self.learning_rate)
        check_positive("radius", self.radius)
        stencils.check_choice("noise", self.noise, get_args(Noise))
        stencils.check(self.noise, self.structure, self.boundary, self.density)

    def describe(self, key: Array, array: QuantizedArray, count: Array) -> Stencil:
        """The stencil of Q(mu u)."""
        return stencils.describe(
            key,
            array,
            value_at(self.radius, count),
            law=self.noise,
            structure=self.structure,
            boundary=self.boundary,
            **stencils.scheduled(self.density, count),
            rounded=True,
        )

    def length(self, step: StepState, total: Array) -> Float[Array, "..."]:
        """-eta g in codes, g = (l+ - l-) / (2 mu^2) Q(mu u) on average over queries."""
        inverse = inverse_at(self.radius, step.count)
        mean = np.float32(0.5 / self.num_queries) * inverse * inverse
        return -(value_at(self.learning_rate, step.count) * mean) * total


def weigh(difference: Array, u: Array) -> Float[Array, "..."]:
    """What a query pair says about each code: (l+ - l-) u."""
    return difference * u.astype(jnp.float32)

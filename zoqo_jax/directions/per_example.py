"""A direction of its own for each example of a batch, for the price of one more product.

Yeming Wen, Paul Vicol, Jimmy Ba, Dustin Tran and Roger Grosse, "Flipout: Efficient
pseudo-independent weight perturbations on mini-batches", 2018, arXiv:1803.04386. Example i looks
along `u * a_i b_i^T`, with `u` one direction of independent entries for all, and `a_i`, `b_i`
random signs of its own. With M and D half the sum and half the difference of the values at the two
ends of `u`,
`x_i @ value(n +- u * a_i b_i^T)` is `x_i @ M +- ((x_i * a_i) @ D) * b_i`, exactly, on every grid.

The objective returns one loss for each example, and every example says something of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int16

from zoqo_jax.directions.base import Contribution, Direction
from zoqo_jax.directions.matmul import (
    Dot,
    Thresholds,
    depends_on,
    lay_along,
    mean_and_half_difference,
)
from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.xla import random_bits

__all__ = ["PerExample"]

_ROW, _COLUMN = 10, 11  # streams of random words of their own; see `entries`


class PerExample(Direction):
    """A direction that is another for each example.

    In every product with the array, the first axis of the vectors is that of the examples, or of
    `k` vectors for each, example by example, as batches lie in most models. An array that meets
    anything else than a matrix product is refused.

    Attributes:
        examples: how many the objective returns losses of.

    Examples:
        >>> import optax, zoqo_jax as zq
        >>> x, y = jnp.eye(4)[:, :3], jnp.array([1.0, 0.0, -1.0, 0.0])
        >>> loss = lambda w: (x @ w - y[:, None])[:, 0] ** 2  # of each example
        >>> params = zq.Quantizer(range=2.0)(jnp.zeros((3, 1)))
        >>> each = zq.directions.with_options("per_example", examples=4)
        >>> tx = zq.zoqo(0.05, 0.05, structure=each, key=jax.random.key(0))
        >>> updates, state = tx.update(None, tx.init(params), params, value_fn=loss)
        >>> state.info.loss_differences.shape
        (1, 4)
    """

    takes_integers = False

    @classmethod
    def describe(cls, *args: Any, examples: int = 1, **choices: Any) -> PerExample:
        """Describe a direction, as `Direction.describe` does, for so many examples."""
        if examples < 1:
            raise ValueError(f"examples must be at least 1, got {examples}.")
        return super().describe(*args, examples=examples, **choices)

    def draw(self, array: QuantizedArray) -> Int16[Array, "..."]:
        """Refused: there is no one direction.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "structure='per_example' has no one direction, and serves matrix products alone: "
            f"freeze the leaf of shape {array.shape} that meets another operation."
        )

    def row_signs(self) -> Int8[Array, "*rows examples"]:
        """The sign that each example has for every row."""
        return random_bits.signs(random_bits.whole(self.rows), self.examples, _ROW)

    def column_signs(self, columns: int) -> Int8[Array, "examples columns"]:
        """The sign that each example has for every column."""
        signs = random_bits.signs(random_bits.shared(self.rows), self.examples * columns, _COLUMN)
        return signs.reshape(self.examples, columns)

    def algorithms(
        self, array: QuantizedArray, dot: Dot, vectors: int, population: int, at: Thresholds
    ) -> tuple[str, ...]:
        """See `Direction.algorithms`: the only one that serves."""
        contracted = [axis in dot.contracted for axis in range(array.ndim - 1)]
        is_one_sided = bool(contracted) and (all(contracted) or not any(contracted))
        if dot.batched or not dot.contracted or not is_one_sided:
            raise ValueError(
                "structure='per_example' serves products of matrices alone: freeze the leaf of "
                f"shape {array.shape} whose axes {dot.contracted} are contracted and "
                f"{dot.batched} are batched."
            )
        return ("mean_difference",)

    def multiply(
        self, algorithms: tuple[str, ...], array: QuantizedArray, x: Array, dot: Dot, at: Thresholds
    ) -> Array:
        """See `Direction.multiply`."""
        del algorithms, at
        axis = self._example_axis(x, dot)
        each = x.shape[axis] // self.examples
        array = depends_on(x, array)
        upward = dataclasses.replace(self, side=jnp.ones_like(self.side))  # both sides share it
        u = Direction.draw(upward.depends_on(x), array)
        mean, half = mean_and_half_difference(array, self, u)
        rows = jnp.moveaxis(self.row_signs(), -1, 0)
        columns = self.column_signs(array.shape[-1])
        signs = [
            (list(range(array.ndim - 1)), jnp.repeat(rows, each, axis=0)),
            ([array.ndim - 1], jnp.repeat(columns, each, axis=0) * self.query_side),
        ]
        turned = x
        for axes, sign in signs:
            if axes[0] in dot.contracted:
                places = [axis, *(dot.x_axis(i) for i in axes)]
                turned = turned * lay_along(sign, places, x.ndim, x.dtype)
        out = dot(half, turned)
        free = [i for i in range(x.ndim) if i not in dot.dims[0][1 - dot.operand]]
        first = 0 if dot.operand else array.ndim - len(dot.contracted)
        for axes, sign in signs:
            if axes[0] not in dot.contracted:
                places = [
                    first + free.index(axis),
                    *(dot.place(i, array.ndim, out.ndim) for i in axes),
                ]
                out = out * lay_along(sign, places, out.ndim, out.dtype)
        return dot(mean, x) + out

    def _example_axis(self, x: Array, dot: Dot) -> int:
        """The axis of the vectors where the examples are: the first that is not contracted."""
        contracted = dot.dims[0][1 - dot.operand]
        free = [axis for axis in range(x.ndim) if axis not in contracted]
        if not free or x.shape[free[0]] % self.examples or not x.shape[free[0]]:
            raise ValueError(
                f"examples must be along the first axis of what multiplies a weight, "
                f"{self.examples} or a multiple of it, got vectors of shape {x.shape}."
            )
        return free[0]

    def contribute(
        self,
        contribution: Contribution,
        difference: Float[Array, " examples"],
        array: QuantizedArray,
    ) -> Array:
        """The sum over examples of what each says about every code."""
        u, weights = Direction.draw(self, array), difference
        if contribution == "signs":
            u, weights = jnp.sign(u), jnp.sign(weights)
        total = jnp.einsum(
            "re,ec->rc",
            self.row_signs().reshape(-1, self.examples).astype(jnp.float32) * weights,
            self.column_signs(array.shape[-1]).astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        return total.reshape(array.shape) * u.astype(jnp.float32)

"""Directions on few inputs of a matrix: a product costs `k / inputs` of the matrix, on any grid.

`x @ value(n +- u)` is `x @ value(n)`, which both sides and all queries share, and
`x[:, chosen] @ (value(n +- u) - value(n))[chosen]`. The inputs are the rows of a matrix as JAX's
layers have it, (inputs, outputs), or its columns as PyTorch's files have it, (outputs, inputs).

Gradients of matrices are sums of (output error) x (input), and most of their energy lies along few
inputs. A `Guide` says which, and of what sign: then a chosen entry is the sign of its input times a
random one of its output, times a draw's size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int16, Int32

from zoqo_jax.directions import entries
from zoqo_jax.directions.base import Direction
from zoqo_jax.directions.matmul import Dot, Thresholds, correct_slices, undisplaced
from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.grids.packing import cut
from zoqo_jax.xla import random_bits

__all__ = ["Columns", "Guide"]

Inputs = Literal["rows", "columns"]

_OUTPUT_SIGN = 8  # a stream of random words of its own; see `entries`


class Guide(NamedTuple):
    """What is known of a matrix's inputs.

    Attributes:
        weights: how often to choose an input, in proportion; not negative, any scale.
        signs: -1, 0 or 1; where 0, and where None, a random sign is drawn for each entry.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> array = Quantizer()(jnp.ones((4, 3)))
        >>> third = Guide(jnp.array([0.0, 0.0, 1.0, 0.0]))
        >>> direction = Columns.describe(jax.random.key(0), array, 3.0, density=1 / 4, guide=third)
        >>> (direction.draw(array) != 0).any(axis=1).tolist()
        [False, False, True, False]
    """

    weights: Float[Array, "*layers inputs"]
    signs: Int8[Array, "*layers inputs"] | None = None


class Columns(Direction):
    """A direction on a share of the inputs of a matrix, the same ones for all of its outputs.

    Attributes:
        slot: broadcastable to the array: 0 where an input is not chosen, else its number among the
            chosen ones, from 1.
        sign: in the same shape, of a guide, or None.
        count: how many inputs are chosen at most, in the whole array.
        inputs: whether they are its rows (every axis but the last) or its columns.
        outputs: chance of an entry of a chosen input to be drawn at all.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> array = Quantizer()(jnp.ones((64, 5)))
        >>> direction = Columns.describe(jax.random.key(0), array, 3.0, density=1 / 16)
        >>> int((direction.draw(array) != 0).any(axis=1).sum())
        4
    """

    takes_density = True

    slot: Int32[Array, "..."] | None = None
    sign: Int16[Array, "..."] | None = None
    count: int = eqx.field(static=True, default=1)
    inputs: Inputs = eqx.field(static=True, default="rows")
    outputs: float = eqx.field(static=True, default=1.0)

    @classmethod
    def describe(
        cls,
        key: Any,
        array: QuantizedArray,
        *args: Any,
        density: float = 1.0,
        densest: float | None = None,
        inputs: Inputs = "rows",
        outputs: float = 1.0,
        guide: Guide | None = None,
        **choices: Any,
    ) -> Columns:
        """Describe a direction, as `Direction.describe` does.

        Args:
            key: as there.
            array: as there.
            args: as there.
            density: share of the inputs, in (0, 1]; a known number.
            densest: not for this structure.
            inputs: where a matrix has its inputs: "rows" (every axis but the last) or "columns".
            outputs: chance of an entry of a chosen input to be drawn.
            guide: which inputs to choose, and their signs.
            choices: as there.
        """
        if isinstance(density, Array | jax.core.Tracer) or densest is not None:
            raise ValueError("density must be a number for structure='columns', no schedule.")
        if inputs not in ("rows", "columns"):
            raise ValueError(f"inputs must be 'rows' or 'columns', got {inputs!r}.")
        if not 0.0 < outputs <= 1.0:
            raise ValueError(f"outputs must be in (0, 1], got {outputs}.")
        # A vector is a matrix of one output.
        inputs = "columns" if array.ndim < 2 else inputs
        size = math.prod(array.shape[:-1]) if inputs == "rows" else math.prod(array.shape[-1:])
        count = min(max(round(density * size), 1), max(size, 1))
        own = {"count": count, "inputs": inputs, "outputs": float(outputs)}
        direction = super().describe(key, array, *args, **own, **choices)
        if guide is not None:
            return direction.guided(guide, array)
        if array.size == 0:
            return dataclasses.replace(direction, slot=jnp.zeros((), jnp.int32))
        places = _stratified(random_bits.rows(key, ()), size, count)
        slot = jnp.zeros(size, jnp.int32).at[places].set(1 + jnp.arange(count))
        return dataclasses.replace(direction, slot=slot.reshape(direction._shape(array)))

    def guided(self, guide: Guide, array: QuantizedArray) -> Columns:
        """The direction with inputs, and their signs, as a guide has them.

        Raises:
            ValueError: the guide is not of this array's inputs.
        """
        *layers, size = guide.weights.shape
        rows, columns = array.shape[:-1], array.shape[-1:]
        is_of_rows = self.inputs == "rows"
        fits = (*layers, size) == rows if is_of_rows else (size,) == columns
        if not fits:
            raise ValueError(
                f"guide must have weights for the {self.inputs} of an array of shape {array.shape},"
                f" got shape {guide.weights.shape}."
            )
        of_layers = math.prod(layers)
        count = max(self.count // of_layers, 1) if is_of_rows else self.count
        words = (self.rows.key0.reshape(-1)[0], self.rows.key1.reshape(-1)[0])
        keys = (jnp.broadcast_to(word, (of_layers,)) for word in words)
        own = random_bits.Rows(*keys, jnp.arange(of_layers, dtype=jnp.uint32))
        places = _weighted(own, guide.weights.reshape(of_layers, size), count)
        slot = jnp.zeros((of_layers, size), jnp.int32)
        slot = slot.at[jnp.arange(of_layers)[:, None], places].set(1 + jnp.arange(count)[None])
        shape = self._shape(array)
        if layers and not is_of_rows:
            shape = (*layers, *(1,) * (array.ndim - len(layers) - 1), size)
        sign = None if guide.signs is None else guide.signs.astype(jnp.int16).reshape(shape)
        most = count * of_layers if is_of_rows else count
        return dataclasses.replace(self, slot=slot.reshape(shape), sign=sign, count=most)

    def _shape(self, array: QuantizedArray) -> tuple[int, ...]:
        """Of `slot`: a number for each input."""
        if self.inputs == "rows":
            return (*array.shape[:-1], 1)
        return (*(1,) * (array.ndim - 1), *array.shape[-1:])

    def entries(self, array: QuantizedArray) -> Int16[Array, "*rows columns"]:
        """The entries for the + side, before the boundary, of an array with a code to a byte."""
        columns = array.shape[-1] if array.ndim else 1
        draw = entries.from_rows(self.rows, columns)
        if self.inputs == "columns":  # draws are by slot: `count` for each row, laid where it is
            few, slot = entries.from_rows(self.rows, self.count), jnp.maximum(self.slot - 1, 0)

            def draw(kind: str, stream: int) -> Array:
                drawn = few(kind, stream)
                where = jnp.broadcast_to(slot, (*drawn.shape[:-1], columns))
                return jnp.take_along_axis(drawn, where, axis=-1)

        m, width = (
            array.broadcast_scales(self.radius_in_codes(array)),
            array.broadcast_scales(self.width(array)),
        )
        u = entries.of(draw, m, width, self.distribution, self.rounding)
        if self.sign is not None:
            signed = jnp.abs(u) * self.sign * self._output_signs(columns)
            u = jnp.where(self.sign == 0, u, signed)
        kept, chance = self.slot > 0, super().probability(array)
        if chance is not None or self.outputs < 1.0:
            chance = 1.0 if chance is None else array.broadcast_scales(chance)
            uniform = (draw("words", entries.SUPPORT) >> 8).astype(jnp.float32) * 2.0**-24
            kept = kept & (uniform < chance * self.outputs)
        return jnp.where(kept, u, 0).astype(jnp.int16)

    def _output_signs(self, columns: int) -> Int16[Array, "..."]:
        """A random sign for each output, that its entries share."""
        if self.inputs == "rows":
            signs = random_bits.signs(random_bits.shared(self.rows), columns, _OUTPUT_SIGN)
            return signs.astype(jnp.int16)
        word = random_bits.words(random_bits.whole(self.rows), 1, _OUTPUT_SIGN)
        return 2 * (word & 1).astype(jnp.int16) - 1

    def take_rows(self, fn: Callable[[Array], Array]) -> Columns:
        """See `Direction.take_rows`."""
        rows = self.side.shape

        def taken(x: Array | None) -> Array | None:
            if x is None or x.ndim == 0:
                return x
            if all(n == 1 for n in x.shape[:-1]):  # every row's
                new = jax.eval_shape(fn, jax.ShapeDtypeStruct((*rows, 1), x.dtype))
                if math.prod(rows) != 1 or x.shape[-1] > 1:
                    return x.reshape((1,) * (len(new.shape) - 1) + x.shape[-1:])
            return fn(jnp.broadcast_to(x, (*rows, x.shape[-1])))

        return dataclasses.replace(
            super().take_rows(fn), slot=taken(self.slot), sign=taken(self.sign)
        )

    def for_layers(self, layers: int) -> Columns:
        """See `Direction.for_layers`."""

        def along(x: Array | None) -> Array | None:
            return x if x is None else jnp.broadcast_to(x, (layers, *x.shape[1:]))

        own = super().for_layers(layers)
        return dataclasses.replace(own, slot=along(self.slot), sign=along(self.sign))

    def part(self, i: Array | int, array: QuantizedArray) -> Columns:
        """See `Direction.part`."""
        of_part = super().part(i, array)
        if self.inputs == "rows" or array.per_byte == 1:
            return of_part
        cuts = [x if x is None else cut(x, i, array.per_byte) for x in (self.slot, self.sign)]
        return dataclasses.replace(of_part, slot=cuts[0], sign=cuts[1])

    def algorithms(
        self, array: QuantizedArray, dot: Dot, vectors: int, population: int, at: Thresholds
    ) -> tuple[str, ...]:
        """See `Direction.algorithms`: "columns" is what the head of this file says."""
        is_matrix = array.ndim == 2 and array.size and not dot.batched
        return ("columns",) if is_matrix and len(dot.contracted) == 1 else ()

    def multiply(
        self, algorithms: tuple[str, ...], array: QuantizedArray, x: Array, dot: Dot, at: Thresholds
    ) -> Array:
        """See `Direction.multiply`."""
        if not algorithms:
            return super().multiply(algorithms, array, x, dot, at)
        axis = 0 if self.inputs == "rows" else 1

        def change(places: Array) -> Array:
            some, direction = self._taken(array, places, axis)
            codes = direction.displaced(some, direction.draw(some))
            after, before = (some.decode(n).astype(jnp.float32) for n in (codes, some.codes))
            return (after - before).astype(array.value_dtype)

        chosen = (self.slot > 0).any(axis=1 - axis)
        out = undisplaced(array, x, dot)
        # Mostly all at once; a stack's layers may have more than the others.
        return correct_slices(out, x, dot, axis, chosen, change, few=self.count)

    def _taken(
        self, array: QuantizedArray, places: Array, axis: int
    ) -> tuple[QuantizedArray, Columns]:
        """The chosen rows or columns, and their direction, a code to a byte."""
        if axis == 0:
            pick = lambda rows: jnp.take(rows, places, axis=0)  # noqa: E731
            return array.take_rows(pick), self.take_rows(pick)
        few = [x if x is None else jnp.take(x, places, axis=-1) for x in (self.slot, self.sign)]
        return array.take_columns(places), dataclasses.replace(self, slot=few[0], sign=few[1])


def _stratified(row: random_bits.Rows, size: int, count: int) -> Int32[Array, " count"]:
    """So many different places, one in each of as many stretches, all equally likely."""
    stretch = size // count
    longest = 2**16  # of `random_bits.below`
    place = random_bits.below(row, min(stretch, longest), count, entries.PLACE)
    if stretch > longest:
        place = place * (stretch // longest)
    turn = random_bits.words(row, 1, entries.SIGN)[0] % jnp.uint32(size)
    places = jnp.arange(count, dtype=jnp.int32) * stretch + place + turn.astype(jnp.int32)
    return places % size


def _weighted(
    rows: random_bits.Rows, weights: Float[Array, "layers inputs"], count: int
) -> Int32[Array, "layers count"]:
    """Places chosen in proportion to weights, one in each of as many equal shares of their sum."""
    below = jnp.cumsum(weights.astype(jnp.float32), axis=-1)
    words = random_bits.words(rows, count, entries.PLACE)
    uniform = (words >> 8).astype(jnp.float32) * 2.0**-24
    total = jnp.maximum(below[:, -1:], jnp.finfo(jnp.float32).tiny)
    at = (jnp.arange(count, dtype=jnp.float32) + uniform) / count * total
    places = jax.vmap(lambda below, at: jnp.searchsorted(below, at, side="right"))(below, at)
    return jnp.minimum(places, weights.shape[-1] - 1).astype(jnp.int32)

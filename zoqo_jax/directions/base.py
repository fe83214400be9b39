"""`Direction`: the integer direction in which a quantized array is probed, made from a key alone.

A direction `u` holds whole numbers of codes, int16, in the shape of its array. It is described by a
few numbers and drawn wherever it is needed, in the forward passes and again in the update, never
stored. A *structure* (dense, rank-one, sparse, ...) is a subclass in a file of its own; a method
knows a direction only by what stands here:

- `describe` makes one from a key, an array and a radius;
- `draw` gives its entries;
- `displaced` gives the legal codes at `n + u`;
- `algorithms` says how a displaced matrix is best multiplied, and `multiply` does it;
- `direction_sum` adds up what a step's queries said along their directions;
- `take_rows` and `part` give the same direction for some of the array's rows, or for one of the
  codes of each byte: a slice of a stack of layers draws what the whole stack draws for it.

The *distribution* of an entry, for a radius of `m = max(floor(mu / s), 1)` codes, is `uniform` on
{-m .. m}, `gaussian` p(k) ~ exp(-(k s)^2 / (2 mu^2)) on {-m .. m} (both of Bar & Giryes, "ZOQO",
arXiv:2501.06736), or `rademacher` on {-m, m} (with m = 1 that of Shu & Zhu, "CAQ-ZO",
arXiv:2605.10673). The last two may also be real numbers of standard deviation `mu / s`, *rounded*
up or down at random; one direction then has two independent roundings (Zhou et al., "QuZO",
arXiv:2502.12346).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8, Int16, Integer, Key

from zoqo_jax.directions import entries, matmul
from zoqo_jax.directions.matmul import Dot, Thresholds
from zoqo_jax.grids.arrays import Grid, QuantizedArray
from zoqo_jax.xla import compiler, random_bits
from zoqo_jax.xla.random_bits import Rows

__all__ = [
    "Boundary",
    "Contribution",
    "Direction",
    "Distribution",
    "Unit",
    "both_sides_fit",
    "displace",
    "radius_in_codes",
]

Distribution = Literal["uniform", "gaussian", "rademacher"]
"""What an entry of a direction may be."""

Boundary = Literal["clamp", "mask", "reflect"]
"""What becomes of an end point that would leave the grid: "clamp" it to the edge, "mask" the
coordinate out of the direction, or "reflect" it."""

Unit = Literal["codes", "values"]
"""What a radius is measured in."""

Contribution = Literal["product", "signs"]
"""What a query adds to the sum for each code: (l+ - l-) u, or sign(l+ - l-) sign(u)."""

# float32 quotients of equal decimals can miss a whole number by an ulp or two: .02 / .001 must
# floor to 20.
FLOOR_TOLERANCE = 1e-6


class Direction(eqx.Module):
    """A direction for one array, described in about twelve bytes a row, mostly never stored.

    Attributes:
        rows: where the random bits of each row (the last axis) come from.
        side: the side of the query, 1 or -1, once for each row.
        radius: mu, one number, or copies of it for a scan.
        off_grid: how far an entry of one moves a level, one number or copies of it for a scan,
            where end points are rounded to the nearest code; None where they are codes.
        unit: of the radius: "values", or "codes" of whatever scale.
        distribution: of an entry.
        boundary: what happens at the grid's edges.
        dithered: whether entries narrower than a code are kept with the chance of their width.
        rounding: which of the two roundings of a real-valued direction, 0 or 1, or None for a
            direction of whole numbers.
        examples: of how many examples the objective returns losses; 0 where it returns one loss.

    Examples:
        >>> from zoqo_jax import Quantizer, directions
        >>> array = Quantizer(range=1.275)(jnp.zeros((2, 3)))  # s = .01
        >>> key = jax.random.key(0)
        >>> signs = directions.describe(key, array, 0.025, unit="values", distribution="rademacher")
        >>> signs.width(array).round(3).item(), signs.radius_in_codes(array).item()
        (2.5, 2)
        >>> bool((signs.flipped(jnp.int8(-1)).draw(array) == -signs.draw(array)).all())
        True
    """

    numbers: ClassVar[tuple[str, ...]] = ("radius", "off_grid")
    """Fields that hold one number, or None: a scan over a stack gives each layer a copy."""
    takes_density: ClassVar[bool] = False
    """Whether `describe` has the arguments `density` and `densest`."""
    takes_integers: ClassVar[bool] = True
    """Whether its products may be those of integers (`integers.py`)."""

    rows: Rows
    side: Int8[Array, "*rows"]
    radius: Float[Array, ""] | Float[Array, " layers"]
    off_grid: Float[Array, ""] | Float[Array, " layers"] | None = None
    unit: Unit = eqx.field(static=True, default="codes")
    distribution: Distribution = eqx.field(static=True, default="uniform")
    boundary: Boundary = eqx.field(static=True, default="clamp")
    dithered: bool = eqx.field(static=True, default=False)
    rounding: int | None = eqx.field(static=True, default=None)
    examples: int = eqx.field(static=True, default=0)

    @classmethod
    def describe(
        cls,
        key: Key[Array, ""],
        array: QuantizedArray,
        radius: Float[Array, ""] | float,
        *,
        rounded: bool = False,
        off_grid: Float[Array, ""] | float | None = None,
        **choices: Any,
    ) -> Direction:
        """Describe a direction for `array`.

        Args:
            key: a key of this array, this step and this query alone.
            array: the array to be probed.
            radius: mu.
            rounded: round a real-valued direction at random: "gaussian" or "rademacher".
            off_grid: how far an entry of one moves a level (at scale 1), where end points are to be
                rounded to the nearest code instead of being codes.
            choices: `unit`, `distribution`, `boundary` and `dithered`, as the attributes, and those
                of the structure.
        """
        rows = random_bits.rows(key, array.shape[:-1])
        side = jnp.ones(rows.index.shape, jnp.int8)
        off_grid = None if off_grid is None else jnp.asarray(off_grid, jnp.float32)
        mu = jnp.asarray(radius, jnp.float32)
        return cls(rows, side, mu, off_grid, rounding=0 if rounded else None, **choices)

    @classmethod
    def check(cls, distribution: str) -> None:
        """Refuse choices that this structure cannot have, by a ValueError; here, none."""

    def draw(self, array: QuantizedArray) -> Int16[Array, "..."]:
        """The entries of the direction, in codes, in the shape of `array`.

        Under boundary="mask" those that would leave the grid on either side are zero.

        Examples:
            >>> from zoqo_jax import Quantizer, directions
            >>> array = Quantizer(range=1.0)(jnp.array([[-1.0, 0.0, 1.0]]))
            >>> choices = {"distribution": "rademacher", "boundary": "mask"}
            >>> direction = directions.describe(jax.random.key(0), array, 1.0, **choices)
            >>> abs(direction.draw(array)).tolist()
            [[0, 1, 0]]
        """
        drawn = [_draw_part(*_part(self, array, i)) for i in range(array.per_byte)]
        return jnp.concatenate(drawn, axis=-1) if len(drawn) > 1 else drawn[0]

    def entries(self, array: QuantizedArray) -> Int16[Array, "*rows columns"]:
        """The entries for the + side, before the boundary, of an array with a code to a byte."""
        return self._independent(array, array.shape[-1] if array.ndim else 1)

    def _independent(
        self,
        array: QuantizedArray,
        columns: int,
        at: Callable[[Array], Array] = lambda per_code: per_code,
        kept: bool = False,
    ) -> Int16[Array, "*rows columns"]:
        """Independent draws of the distribution.

        Args:
            array: with a code to a byte.
            columns: how many for each row.
            at: from what broadcasts with the codes to what broadcasts with the draws.
            kept: whether to keep random words in memory.
        """
        width, m = (
            at(array.broadcast_scales(x)) for x in (self.width(array), self.radius_in_codes(array))
        )
        draw = entries.from_rows(self.rows, columns, kept)
        u = entries.of(draw, m, width, self.distribution, self.rounding)
        chance = self.probability(array)
        if chance is None:
            return u
        return jnp.where(self._support(at(array.broadcast_scales(chance)), columns), u, 0)

    def _support(self, chance: Array, columns: int) -> Bool[Array, "*rows columns"]:
        """Which entries are in the support, each by a chance of its own."""
        return random_bits.bernoulli(self.rows, chance, columns, entries.SUPPORT)

    def displaced(self, array: QuantizedArray, u: Int16[Array, "..."]) -> Int16[Array, "..."]:
        """The legal codes that an array's become at `u`, the direction or its opposite."""
        if self.off_grid is None:
            return displace(array.codes, u, array.grid, self.boundary)
        distance = one_number(self.off_grid, array.ndim) * u.astype(jnp.float32)
        return array.grid.nearest(array.grid.at(array.codes) + distance)

    def algorithms(
        self, array: QuantizedArray, dot: Dot, vectors: int, population: int, at: Thresholds
    ) -> tuple[str, ...]:
        """The matmul algorithms that cost less than "dequantize" here, the best first.

        Args:
            array: the matrix.
            dot: how it is multiplied.
            vectors: how many are multiplied for each displacement.
            population: displacements evaluated together.
            at: where one algorithm begins to cost less than another.

        Returns:
            Their names; each but the last may hand a product on to the next.
        """
        del array, dot, vectors, population, at
        return ()

    def multiply(
        self, algorithms: tuple[str, ...], array: QuantizedArray, x: Array, dot: Dot, at: Thresholds
    ) -> Array:
        """The product with the displaced matrix, by what `algorithms` chose; () is "dequantize".

        Under `jax.vmap` over sides and queries it shares among them what it can.
        """
        del algorithms, at
        return matmul.dequantize(array, self, x, dot)

    @classmethod
    def direction_sum(
        cls,
        of_query: Callable[[Any], tuple[Direction, QuantizedArray]],
        loss_differences: Float[Array, "queries ..."],
        contribution: Contribution,
    ) -> Array:
        """The sum over queries of what each says about every code.

        Args:
            of_query: from a query's number to its direction and the array, a code to a byte.
            loss_differences: l+ - l- of each, exact in any order of summation
                (`queries.differences`).
            contribution: what a query says.
        """

        def one(query: Any) -> Array:
            direction, array = of_query(query)
            return direction.contribute(contribution, loss_differences[query], array)

        if len(loss_differences) == 1:
            return one(0)
        add = lambda query, total: total + one(query)  # noqa: E731
        return jax.lax.fori_loop(1, len(loss_differences), add, one(0))

    def contribute(
        self, contribution: Contribution, difference: Array, array: QuantizedArray
    ) -> Array:
        """What one query, by its difference of losses, says about each code."""
        return contribute(contribution, difference, self.draw(array))

    def guided(self, guide: Any, array: QuantizedArray) -> Direction:
        """The direction with what is known of the array's inputs (see `columns.Guide`).

        Raises:
            ValueError: this structure takes no guide.
        """
        raise ValueError(f"guides serve structure='columns', got {type(self).__name__}.")

    def flipped(self, side: Int8[Array, ""]) -> Direction:
        """The direction `side * u`, side in {-1, 1}."""
        return dataclasses.replace(self, side=self.side * side)

    def take_rows(self, fn: Callable[[Array], Array]) -> Direction:
        """The direction of rearranged, picked or repeated rows.

        Args:
            fn: maps (*rows, k) to (*new_rows, k) for any k, the same rows for every k.
        """
        rows, side = jax.tree.map(lambda x: fn(x[..., None])[..., 0], (self.rows, self.side))
        return dataclasses.replace(self, rows=rows, side=side)

    def for_layers(self, layers: int) -> Direction:
        """The direction of a stack that a scan takes apart: `numbers` are copied for each layer."""
        given = {name: getattr(self, name) for name in self.numbers}
        copies = {
            name: jnp.broadcast_to(number.reshape(-1)[0], (layers,))
            for name, number in given.items()
            if number is not None
        }
        return dataclasses.replace(self, **copies)

    def part(self, i: Array | int, array: QuantizedArray) -> Direction:
        """The direction of the i-th code of every byte of `array`; `i` may be traced."""
        del array
        return dataclasses.replace(self, rows=random_bits.part(self.rows, i))

    def depends_on(self, x: Array) -> Direction:
        """The same direction, not to be drawn before `x` is known."""
        key0 = compiler.depends_on(x, self.rows.key0)
        return dataclasses.replace(self, rows=dataclasses.replace(self.rows, key0=key0))

    def signs_only(self) -> Direction:
        """A direction whose entries have the same signs, easier to draw where that can be."""
        if self.distribution != "rademacher" or self.dithered or self.boundary == "mask":
            return self
        return dataclasses.replace(self, radius=jnp.ones_like(self.radius), unit="codes")

    def rounded_again(self) -> Direction:
        """The same real-valued direction, rounded independently."""
        return dataclasses.replace(self, rounding=1)

    @property
    def query_side(self) -> Int8[Array, ""]:
        """The side of the query, 1 or -1."""
        return self.side.reshape(-1)[0]

    def width(self, array: QuantizedArray) -> Float[Array, "..."]:
        """The radius in codes, not yet floored: in the shape of the scale, or one number."""
        radius = one_number(self.radius, array.ndim)
        return radius if self.unit == "codes" else radius / array.step

    def radius_in_codes(self, array: QuantizedArray) -> Int16[Array, "..."]:
        """The radius in whole codes, as `width`; kept in memory, lest every entry compute it."""
        width = self.width(array)
        if width.size == 1:
            return radius_in_codes(width, array.grid)
        return compiler.materialized(lambda: radius_in_codes(width, array.grid), width)

    def probability(self, array: QuantizedArray) -> Float[Array, "..."] | None:
        """Chance of an entry to be in the support, as `width`, or None for 1."""
        return jnp.minimum(self.width(array), 1.0) if self.dithered else None


def _part(
    direction: Direction, array: QuantizedArray, i: Array | int
) -> tuple[Direction, QuantizedArray]:
    return direction.part(i, array), array.part(i)


def _draw_part(direction: Direction, array: QuantizedArray) -> Int16[Array, "..."]:
    """The direction of one part."""
    if array.size == 0:
        return jnp.zeros(array.shape, jnp.int16)
    u = direction.entries(array)
    u = (u * direction.side.astype(jnp.int16)[..., None]).reshape(array.shape)
    if direction.boundary == "mask":
        u = jnp.where(both_sides_fit(array.packed, u, array.grid), u, 0)
    return u


def contribute(contribution: Contribution, difference: Array, u: Array) -> Array:
    """What one query says about each code: a product, or one of signs that stays with integers.

    Examples:
        >>> contribute("signs", jnp.float32(-0.5), jnp.array([3, 0], jnp.int16)).tolist()
        [-1, 0]
    """
    if contribution == "signs":
        return jnp.sign(difference).astype(jnp.int16) * jnp.sign(u)
    return difference * u.astype(jnp.float32)


def displace(
    codes: Integer[Array, "..."], u: Integer[Array, "..."], grid: Grid, boundary: Boundary
) -> Int16[Array, "..."]:
    """The legal codes that `codes + u` becomes at the grid's edges.

    Under "mask" a coordinate whose other side, `codes - u`, would leave the grid stays as well.

    Examples:
        >>> grid = Grid((0.0, 1.0, 2.0, 3.0), 0, 3)
        >>> codes, u = jnp.array([0, 2, 3]), jnp.array([-1, 2, 1])
        >>> [displace(codes, u, grid, how).tolist() for how in ("clamp", "mask", "reflect")]
        [[0, 3, 3], [0, 2, 3], [1, 2, 2]]
    """
    n = codes.astype(jnp.int16)
    moved = n + u.astype(jnp.int16)
    if boundary == "mask":
        return jnp.where(both_sides_fit(codes, u, grid), moved, n)
    if boundary == "reflect":
        moved = jnp.where(moved > grid.high, 2 * grid.high - moved, moved)
        moved = jnp.where(moved < grid.low, 2 * grid.low - moved, moved)
    return jnp.clip(moved, grid.low, grid.high)


def both_sides_fit(codes: Array, u: Array, grid: Grid) -> Bool[Array, "..."]:
    """Whether neither `codes + u` nor `codes - u` leaves the grid."""
    n, size = codes.astype(jnp.int16), jnp.abs(u).astype(jnp.int16)
    return (n + size <= grid.high) & (n - size >= grid.low)


def radius_in_codes(width: Float[Array, "..."], grid: Grid) -> Int16[Array, "..."]:
    """ZOQO's m = max(floor(mu / s), 1), with a tolerance for the floor, at most the grid's width.

    Examples:
        >>> grid = Grid(tuple(map(float, range(256))), 0, 255)
        >>> radius_in_codes(jnp.float32(0.02) / jnp.float32(0.001), grid).item()
        20
    """
    widest = float(grid.high - grid.low)
    return jnp.clip(jnp.floor(width * (1.0 + FLOOR_TOLERANCE)), 1.0, widest).astype(jnp.int16)


def one_number(x: Array, ndim: int) -> Array:
    """A number, or what an array holds copies of, with so many axes."""
    return x.reshape(-1)[0].reshape((1,) * ndim)

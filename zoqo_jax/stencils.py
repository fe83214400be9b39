"""Stencils: the integer directions in which a quantized array is probed, made from a key alone.

A direction `u` holds whole numbers of codes, int16. It is described by a `Stencil` and drawn where
it is needed, in the forward pass and again in the update, never kept. Three choices make one:

- *law*, what one entry may be, for a reach `m = max(floor(mu / s), 1)` in codes: `uniform` on {-m
  .. m}, `gaussian` p(k) ~ exp(-(k s)^2 / (2 mu^2)) on {-m .. m} (both of Bar & Giryes, "ZOQO",
  arXiv:2501.06736), or `rademacher` on {-m, m} (with m = 1 that of Shu & Zhu, "CAQ-ZO",
  arXiv:2605.10673). The last two may also be real numbers of standard deviation `mu / s`, *rounded*
  up or down at random; one direction then has two independent roundings (Zhou et al., "QuZO",
  arXiv:2502.12346);
- *structure*, how entries hang together: `dense` independent; `rank_one` one row of draws for the
  array, times an independent sign for every row, so that entries stay uncorrelated and a product
  with the array can share its weights; `sparse` dense entries on a random support, which draws a
  few words for each of its entries and none for the others;
- *boundary*, what becomes of an end point that would leave the grid: `clamp` it to the edge, `mask`
  the coordinate out of the direction, or `reflect` it.

Bits come row by row (a row is the last axis) from `draws.py`, so a slice of a stack of layers draws
what the whole stack draws for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int8, Int16, Integer, Key

from zoqo_jax import compiler, draws, projection
from zoqo_jax.arrays import Grid, QuantizedArray
from zoqo_jax.draws import Rows

__all__ = [
    "Boundary",
    "Law",
    "Stencil",
    "Structure",
    "Unit",
    "check",
    "check_choice",
    "column_signs",
    "describe",
    "displace",
    "dithered_reach",
    "draw",
    "part",
    "reach",
    "row_signs",
    "weighted_signs",
]

Law = Literal["uniform", "gaussian", "rademacher"]
"""What an entry of a direction may be."""

Structure = Literal["dense", "rank_one", "sparse"]
"""How the entries of a direction hang together."""

Boundary = Literal["clamp", "mask", "reflect"]
"""What becomes of an end point that would leave the grid."""

Unit = Literal["codes", "values"]
"""What a radius is measured in."""

# float32 quotients of equal decimals can miss a whole number by an ulp or two: .02 / .001 must
# floor to 20.
_FLOOR_TOLERANCE = 1e-6
_LONGEST_CELL = 2**16
_CELLS_FILLED = 0.75  # about this share of cells is in a support
_SIGN, _ENTRY, _PLACE, _SUPPORT, *_ROUNDINGS = range(6)  # streams of random words


class Stencil(eqx.Module):
    """A direction for one array, described.

    Attributes:
        rows: where the bits of each row come from.
        side: the side of the query, 1 or -1, once for each row.
        radius: mu, one number, or copies of it for a scan.
        share: chance of an entry, or of a cell's one entry, to be in the support, one number or
            copies of it for a scan, or None for 1.
        unit: of the radius: "values", or "codes" of whatever scale.
        dithered: whether entries narrower than a code are kept with the chance of their width.
        digits: binary digits that represent probabilities, at most 24.
        cell: neighbours in a row of whom at most one is in the support; 1 for no limit.
        law: the law of an entry.
        structure: how entries hang together.
        boundary: what happens at the grid's edges.
        rounding: which of the two roundings of a real-valued direction, 0 or 1, or None for a
            direction of whole numbers.
        off_grid: how far an entry of one moves a level, one number or copies of it for a scan,
            where end points are rounded to the nearest code; None where they are codes.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> array = Quantizer(range=1.275)(jnp.zeros((2, 3)))  # s = .01
        >>> key = jax.random.key(0)
        >>> signs = describe(key, array, 0.025, unit="values", law="rademacher")
        >>> signs.width(array).round(3).item(), signs.reach(array).item()
        (2.5, 2)
        >>> bool((draw(signs.flipped(jnp.int8(-1)), array) == -draw(signs, array)).all())
        True
    """

    rows: Rows
    side: Int8[Array, "*rows"]
    radius: Float[Array, ""] | Float[Array, " layers"]
    share: Float[Array, ""] | Float[Array, " layers"] | None
    unit: Unit = eqx.field(static=True)
    dithered: bool = eqx.field(static=True)
    digits: int = eqx.field(static=True)
    cell: int = eqx.field(static=True)
    law: Law = eqx.field(static=True)
    structure: Structure = eqx.field(static=True)
    boundary: Boundary = eqx.field(static=True)
    rounding: int | None = eqx.field(static=True, default=None)
    off_grid: Float[Array, ""] | Float[Array, " layers"] | None = None

    def flipped(self, side: Int8[Array, ""]) -> Stencil:
        """The stencil of `side * u`, side in {-1, 1}."""
        return dataclasses.replace(self, side=self.side * side)

    @property
    def is_rank_one_signs(self) -> bool:
        """Whether an entry is its row's sign times its column's, up to reach and edges."""
        is_whole = self.rounding is None and not self.dithered
        is_signs = self.law == "rademacher" and self.share is None and is_whole
        return self.structure == "rank_one" and is_signs

    def width(self, array: QuantizedArray) -> Float[Array, "..."]:
        """The radius in codes, not yet floored: in the shape of the scale, or one number."""
        radius = _one_number(self.radius, array.ndim)
        return radius if self.unit == "codes" else radius / array.step

    def reach(self, array: QuantizedArray) -> Int16[Array, "..."]:
        """How far entries may reach, in codes, as `width`; kept, lest every entry compute it."""
        width = self.width(array)
        if width.size == 1:
            return reach(width, array.grid)
        like = jax.ShapeDtypeStruct(width.shape, jnp.int16)
        return compiler.held(lambda: reach(width, array.grid), self.rows.key0, like)

    def one_code_long(self) -> Stencil:
        """A stencil whose entries have the same signs, easier to draw where that can be."""
        if self.law != "rademacher" or self.dithered or self.boundary == "mask":
            return self
        return dataclasses.replace(self, radius=jnp.ones_like(self.radius), unit="codes")

    def rounded_again(self) -> Stencil:
        """The same real-valued direction, rounded independently."""
        return dataclasses.replace(self, rounding=1)

    def displaced(self, array: QuantizedArray, u: Int16[Array, "..."]) -> Int16[Array, "..."]:
        """The legal codes that an array's become at `u`, a side of the direction."""
        if self.off_grid is None:
            return displace(array.codes, u, array.grid, self.boundary)
        distance = _one_number(self.off_grid, array.ndim) * u.astype(jnp.float32)
        return array.grid.nearest(array.grid.at(array.codes) + distance)

    def probability(self, array: QuantizedArray) -> Float[Array, "..."] | None:
        """Chance of an entry to be in the support, as `width`, or None for 1."""
        kept = jnp.minimum(self.width(array), 1.0) if self.dithered else None
        if self.share is None:
            return kept
        share = _one_number(self.share, array.ndim)
        return share if kept is None else kept * share


def describe(
    key: Key[Array, ""],
    array: QuantizedArray,
    radius: Float[Array, ""] | float,
    *,
    unit: Unit = "codes",
    law: Law = "uniform",
    structure: Structure = "dense",
    boundary: Boundary = "clamp",
    density: Float[Array, ""] | float = 1.0,
    densest: float | None = None,
    dithered: bool = False,
    rounded: bool = False,
    off_grid: Float[Array, ""] | float | None = None,
) -> Stencil:
    """Describe a direction for `array`.

    Args:
        key: a key of this array, this step and this query alone.
        array: the array to be probed.
        radius: mu.
        unit: of the radius: "values", or "codes" of whatever scale.
        law: law of an entry.
        structure: how entries hang together.
        boundary: what happens at the grid's edges.
        density: expected fraction of the support, in (0, 1], for structure="sparse". A number costs
            draws by its size; a traced array draws for every entry, or by the size of `densest`.
        densest: what a traced density never exceeds.
        dithered: where mu is less than a code, keep an entry with probability mu / s instead of
            widening its reach to one whole code.
        rounded: round a real-valued direction at random, for law="gaussian" or "rademacher".
        off_grid: how far an entry of one moves a level (at scale 1), where end points are to be
            rounded to the nearest code instead of being codes.

    Returns:
        The stencil, about twelve bytes a row, which a compiled program never stores.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> array = Quantizer(range=1.0)(jnp.zeros((2, 3)))
        >>> draw(describe(jax.random.key(0), array, 2.0), array).shape
        (2, 3)
    """
    rows = draws.rows(key, array.shape[:-1])
    cell, share, digits = 1, None, draws.RESOLUTION
    if structure == "sparse":
        cell, share = _cells(density, densest)
        digits = draws.RESOLUTION if share is None else _digits(share)
    digits = draws.RESOLUTION if dithered else digits
    side = jnp.ones(rows.index.shape, jnp.int8)
    mu = jnp.asarray(radius, jnp.float32)
    share = None if share is None else jnp.asarray(share, jnp.float32)
    off_grid = None if off_grid is None else jnp.asarray(off_grid, jnp.float32)
    choices = (unit, dithered, digits, cell, law, structure, boundary, 0 if rounded else None)
    return Stencil(rows, side, mu, share, *choices, off_grid)


def draw(stencil: Stencil, array: QuantizedArray) -> Int16[Array, "..."]:
    """The direction that a stencil describes, in codes, in the shape of `array`.

    Under boundary="mask" the entries that would leave the grid on either side are zero.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> array = Quantizer(range=1.0)(jnp.array([[-1.0, 0.0, 1.0]]))
        >>> key = jax.random.key(0)
        >>> probe = describe(key, array, 1.0, law="rademacher", boundary="mask")
        >>> abs(draw(probe, array)).tolist()
        [[0, 1, 0]]
    """
    drawn = [_draw(*part(stencil, array, i)) for i in range(array.per_byte)]
    return jnp.concatenate(drawn, axis=-1) if len(drawn) > 1 else drawn[0]


def part(stencil: Stencil, array: QuantizedArray, i: Array | int) -> tuple[Stencil, QuantizedArray]:
    """A stencil and its array for one of the parts whose codes share bytes; their draws differ.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> array = Quantizer(bits=4)(jnp.ones((1, 6)))  # two codes a byte
        >>> probe = describe(jax.random.key(0), array, 3.0)
        >>> halves = [draw(*part(probe, array, i)) for i in range(2)]
        >>> bool((jnp.concatenate(halves, axis=-1) == draw(probe, array)).all())
        True
    """
    return dataclasses.replace(stencil, rows=draws.part(stencil.rows, i)), array.part(i)


def _draw(stencil: Stencil, array: QuantizedArray) -> Int16[Array, "..."]:
    """The direction of one part."""
    if array.size == 0:
        return jnp.zeros(array.shape, jnp.int16)
    columns = array.shape[-1] if array.ndim else 1
    width, chance = array.spread(stencil.width(array)), stencil.probability(array)
    chance = None if chance is None else array.spread(chance)
    m = array.spread(stencil.reach(array))
    entries = _entries if stencil.cell == 1 else _scattered_entries
    u = entries(stencil, m, width, chance, columns)
    u = (u * stencil.side.astype(jnp.int16)[..., None]).reshape(array.shape)
    if stencil.boundary == "mask":
        u = jnp.where(_both_sides_fit(array.packed, u, array.grid), u, 0)
    return u


def row_signs(stencil: Stencil) -> Int8[Array, "*rows"]:
    """The sign of every row of a rank-one direction, for the + side of a query.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> array, key = Quantizer()(jnp.ones((3, 4))), jax.random.key(0)
        >>> probe = describe(key, array, 1.0, law="rademacher", structure="rank_one")
        >>> a, b = row_signs(probe), column_signs(probe, array)
        >>> bool((draw(probe, array) == jnp.outer(a, b)).all())
        True
    """
    rows = draws.whole(stencil.rows)
    like = jax.ShapeDtypeStruct(rows.index.shape, jnp.uint32)
    word = compiler.held(lambda: draws.words(rows, 1, _SIGN)[..., 0], rows.key0, like)
    return 2 * (word & 1).astype(jnp.int8) - 1


def column_signs(stencil: Stencil, array: QuantizedArray) -> Int8[Array, " columns"]:
    """The signs that all rows of a rank-one Rademacher direction share.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> array, key = Quantizer()(jnp.ones((3, 4))), jax.random.key(0)
        >>> probe = describe(key, array, 1.0, law="rademacher", structure="rank_one")
        >>> abs(column_signs(probe, array)).tolist()
        [1, 1, 1, 1]
    """
    columns = array.packed.shape[-1] if array.ndim else 1
    row = draws.shared(stencil.rows)
    by_part = [draws.signs(draws.part(row, i), columns, _ENTRY) for i in range(array.per_byte)]
    return jnp.concatenate([signs.reshape(columns) for signs in by_part])


def weighted_signs(
    stencils: Stencil, weights: Float[Array, " queries"], array: QuantizedArray
) -> Float[Array, "..."]:
    """The sum over queries of a weight times the signs of a rank-one direction: one product.

    Args:
        stencils: of all queries, their arrays stacked.
        weights: exact in any order of summation, as `queries.differences` are.
        array: in whose shape, a code to a byte.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> array, keys = Quantizer()(jnp.ones((3, 4))), jax.random.split(jax.random.key(0))
        >>> signs = lambda key: describe(key, array, 1.0, law="rademacher", structure="rank_one")
        >>> total = weighted_signs(jax.vmap(signs)(keys), jnp.array([0.5, 0.25]), array)
        >>> by_hand = 0.5 * draw(signs(keys[0]), array) + 0.25 * draw(signs(keys[1]), array)
        >>> bool((total == by_hand).all())
        True
    """
    a = jax.vmap(row_signs)(stencils).reshape(weights.shape[0], -1)
    b = jax.vmap(lambda stencil: column_signs(stencil, array))(stencils)
    total = jnp.einsum(
        "qr,qc->rc",
        a.astype(weights.dtype) * weights[:, None],
        b.astype(weights.dtype),
        precision=jax.lax.Precision.HIGHEST,
    ).reshape(array.shape)
    if stencils.boundary == "mask":
        first = jax.tree.map(lambda x: x[0], stencils)
        m = array.spread(first.reach(array))
        total = jnp.where(_both_sides_fit(array.packed, m, array.grid), total, 0.0)
    return total


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
        return jnp.where(_both_sides_fit(codes, u, grid), moved, n)
    if boundary == "reflect":
        moved = jnp.where(moved > grid.high, 2 * grid.high - moved, moved)
        moved = jnp.where(moved < grid.low, 2 * grid.low - moved, moved)
    return jnp.clip(moved, grid.low, grid.high)


def reach(width: Float[Array, "..."], grid: Grid) -> Int16[Array, "..."]:
    """ZOQO's m = max(floor(mu / s), 1), with a tolerance for the floor, at most the grid's width.

    Examples:
        >>> grid = Grid(tuple(map(float, range(256))), 0, 255)
        >>> reach(jnp.float32(0.02) / jnp.float32(0.001), grid).item()
        20
    """
    widest = float(grid.high - grid.low)
    return jnp.clip(jnp.floor(width * (1.0 + _FLOOR_TOLERANCE)), 1.0, widest).astype(jnp.int16)


def _one_number(x: Array, ndim: int) -> Array:
    """A number, or what an array holds copies of, with so many axes."""
    return x.reshape(-1)[0].reshape((1,) * ndim)


def dithered_reach(
    rows: Rows, width: Float[Array, "..."], array: QuantizedArray
) -> Int16[Array, "..."]:
    """floor(width + U), U uniform in [0, 1) for each coordinate: `width` codes on average.

    Args:
        rows: where the bits come from.
        width: in codes, in the shape of `array.scale`.
        array: whose coordinates, a code to a byte.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> array = Quantizer()(jnp.ones((1, 10_000)))
        >>> moves = dithered_reach(draws.rows(jax.random.key(0), (1,)), jnp.float32(1.25), array)
        >>> sorted(set(moves.ravel().tolist())), round(moves.mean().item(), 2)
        ([1, 2], 1.25)
    """
    shape = array.shape
    whole = jnp.clip(jnp.floor(width * (1.0 + _FLOOR_TOLERANCE)), 0.0, float(array.grid.high))
    rest = array.spread(jnp.clip(width - whole, 0.0, 1.0))
    up = draws.bernoulli(rows, rest, shape[-1] if shape else 1, 0).reshape(shape)
    return array.spread(whole.astype(jnp.int16)) + up.astype(jnp.int16)


def check(law: str, structure: str, boundary: str, density: Any) -> None:
    """Refuse choices that no stencil can have.

    Raises:
        ValueError: an unknown name, a density outside (0, 1], or one for a structure that is not
            sparse.

    Examples:
        >>> check("uniform", "dense", "clamp", 0.5)
        Traceback (most recent call last):
        ValueError: density=0.5 needs structure='sparse', got structure='dense'.
    """
    given = (
        ("noise", law, Law),
        ("structure", structure, Structure),
        ("boundary", boundary, Boundary),
    )
    for name, value, choices in given:
        check_choice(name, value, get_args(choices))
    if isinstance(density, Array | Tracer):
        return
    if callable(density):
        density = _densest(density)
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {density}.")
    if density != 1.0 and structure != "sparse":
        raise ValueError(
            f"density={density} needs structure='sparse', got structure={structure!r}."
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a name that is not among the choices.

    Examples:
        >>> check_choice("vote", "most", ("mean", "majority"))
        Traceback (most recent call last):
        ValueError: vote must be one of ('mean', 'majority'), got 'most'.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")


def _entries(
    stencil: Stencil, m: Array, width: Array, chance: Array | None, columns: int
) -> Int16[Array, "*rows columns"]:
    """Draws of the law for the + side, on its support."""
    ranked = stencil.structure == "rank_one"
    rows = draws.shared(stencil.rows) if ranked else stencil.rows
    bits = draws.signs if stencil.law == "rademacher" else draws.words
    words = bits(rows, columns, _ENTRY)
    if ranked:  # what all rows share is made once
        words = compiler.kept(words)
    if stencil.rounding is not None:
        is_signs = stencil.law == "rademacher"
        real = words.astype(jnp.float32) if is_signs else draws.gaussian(words)
        chances = draws.words(rows, columns, _ROUNDINGS[stencil.rounding])
        u = projection.stochastic(chances, width * real).astype(jnp.int16)
    elif stencil.law == "rademacher":
        u = m * words.astype(jnp.int16)
    else:
        size = _uniform_size if stencil.law == "uniform" else _gaussian_size
        magnitude = size(words >> 1, m, width)
        u = jnp.where(words & 1, -magnitude, magnitude)  # a fair sign: exactly symmetric
    if ranked:
        u = u * row_signs(stencil).astype(jnp.int16)[..., None]
    if chance is None:
        return u
    support = draws.bernoulli(stencil.rows, chance, columns, _SUPPORT, stencil.digits)
    return jnp.where(support, u, 0)


def _scattered_entries(
    stencil: Stencil, m: Array, width: Array, chance: Array | None, columns: int
) -> Int16[Array, "*rows columns"]:
    """Draws of the law, at most one in a cell of neighbours; past the end of a row it is lost."""
    rows, cell = stencil.rows, stencil.cell
    cells = -(-columns // cell)

    def entry_and_place() -> Array:
        place = draws.below(rows, cell, cells, _PLACE)
        first = cell * jnp.arange(cells, dtype=jnp.int32)
        column = jnp.minimum(place + first.reshape((1,) * (place.ndim - 1) + (cells,)), columns - 1)

        def at_places(spread: Array) -> Array:
            if spread.ndim == 0 or spread.shape[-1] == 1:
                return spread
            whole = jnp.broadcast_to(spread, (*column.shape[:-1], columns))
            return jnp.take_along_axis(whole, column, axis=-1)

        kept = None if chance is None else at_places(chance)
        u = _entries(stencil, at_places(m), at_places(width), kept, cells)
        return u.astype(jnp.int32) * 2 * _LONGEST_CELL + place

    like = jax.ShapeDtypeStruct((*rows.index.shape, cells), jnp.int32)
    drawn = compiler.held(entry_and_place, rows.key0, like)[..., None]
    places = jnp.arange(cell, dtype=jnp.int32).reshape((1,) * (drawn.ndim - 1) + (cell,))
    is_place = (drawn & (2 * _LONGEST_CELL - 1)) == places
    u = jnp.where(is_place, drawn >> (2 * _LONGEST_CELL).bit_length() - 1, 0).astype(jnp.int16)
    return u.reshape(*rows.index.shape, cells * cell)[..., :columns]


def _uniform_size(random: Array, m: Array, width: Array) -> Int16[Array, "..."]:
    """|k| of a uniform k on {-m .. m}, from whole numbers uniform on 0 .. 2^31 - 1."""
    del width
    count = (2 * m + 1).astype(jnp.uint32)
    high, low = random >> 15, random & 0x7FFF  # random * count / 2^31 without a 64-bit product
    return (((high * count + ((low * count) >> 15)) >> 16).astype(jnp.int16) + 1) >> 1


def _gaussian_size(random: Array, m: Array, width: Array) -> Int16[Array, "..."]:
    """|k| of k on {-m .. m} with p(k) ~ exp(-k^2 / (2 width^2)), by inverting the distribution."""
    m = m.astype(jnp.int32)
    uniform = random.astype(jnp.float32) * 2.0**-31

    def weight(k: Array) -> Array:
        both = jnp.where(k == 0, 1.0, 2.0)
        deviations = k.astype(jnp.float32) / width
        return jnp.where(k <= m, both * jnp.exp(-0.5 * deviations**2), 0.0)

    def invert(k: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        below, size = state
        below = below + weight(k) / total
        return below, size + (uniform >= below).astype(jnp.int32)

    widest = jnp.max(m)
    shape, sources = jnp.broadcast_shapes(m.shape, width.shape), (m, width, random)
    zero = compiler.zeros(jax.ShapeDtypeStruct(shape, jnp.float32), *sources)
    total = jax.lax.fori_loop(0, widest + 1, lambda k, sum_: sum_ + weight(k), zero)
    shape = jnp.broadcast_shapes(zero.shape, uniform.shape)
    size = compiler.zeros(jax.ShapeDtypeStruct(shape, jnp.int32), *sources)
    _, size = jax.lax.fori_loop(0, widest, invert, (zero, size))
    return jnp.minimum(size, m).astype(jnp.int16)


def _both_sides_fit(codes: Array, u: Array, grid: Grid) -> Bool[Array, "..."]:
    n, size = codes.astype(jnp.int16), jnp.abs(u).astype(jnp.int16)
    return (n + size <= grid.high) & (n - size >= grid.low)


def scheduled(density: Any, count: Array) -> dict[str, Any]:
    """What `describe` is to know of a density, or of a schedule of densities, at a step."""
    if not callable(density):
        return {"density": density}
    return {"density": jnp.asarray(density(count), jnp.float32), "densest": _densest(density)}


def _densest(schedule: Callable[[Any], Any]) -> float:
    """A schedule's first density, which none may exceed."""
    with jax.ensure_compile_time_eval():
        return float(schedule(0))


def _cells(
    density: Array | float, densest: float | None = None
) -> tuple[int, Array | float | None]:
    """The length of a cell, and the share of cells in the support or None for all of them.

    Were every cell in the support of every direction, parities between cells would never change.
    """
    if densest is not None:
        cell, _ = _cells(densest)
        return cell, jnp.clip(density * cell, 0.0, 1.0)
    if isinstance(density, Array | Tracer):
        return 1, density
    cell = min(max(int(_CELLS_FILLED / density), 1), _LONGEST_CELL)
    share = density * cell
    return cell, None if share == 1.0 else share


def _digits(density: Array | float) -> int:
    """The fewest binary digits that hold a known density exactly, or all of them."""
    if isinstance(density, Array | Tracer):
        return draws.RESOLUTION
    exact = (k for k in range(1, draws.RESOLUTION) if float(density * 2.0**k).is_integer())
    return next(exact, draws.RESOLUTION)

"""Stencils: the integer directions in which a quantized array is probed, made from a key alone.

A direction `u` holds whole numbers of codes. It is described by a `Stencil` and drawn where it is
needed, in the forward pass and again in the update, never kept. Three choices make one:

- *law*, what one entry may be, for a reach `m = max(floor(mu / s), 1)` in codes: `uniform` on {-m
  .. m}, `gaussian` p(k) ~ exp(-(k s)^2 / (2 mu^2)) on {-m .. m} (both of Bar & Giryes, "ZOQO",
  arXiv:2501.06736), or `rademacher` on {-m, m} (with m = 1 that of Shu & Zhu, "CAQ-ZO",
  arXiv:2605.10673);
- *structure*, how entries hang together: `dense` independent; `rank_one` one row of draws for a
  matrix, times an independent sign for every row, so that entries stay uncorrelated and a matrix
  product can share its weights; `sparse` dense entries on a random support;
- *boundary*, what becomes of an end point that would leave the grid: `clamp` it to the edge, `mask`
  the coordinate out of the direction, or `reflect` it.

Randomness is drawn row by row (a row is the last axis), each from a key of its own, so a slice of a
stack of layers draws what the whole stack draws for it, and 32 signs come from each random word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int8, Int32, Integer, Key, UInt32

from zoqo_jax.arrays import Grid, QuantizedArray

__all__ = [
    "Boundary",
    "Law",
    "Stencil",
    "Structure",
    "bernoulli",
    "check",
    "check_choice",
    "describe",
    "displace",
    "dithered_reach",
    "draw",
    "reach",
    "signs",
]

Law = Literal["uniform", "gaussian", "rademacher"]
Structure = Literal["dense", "rank_one", "sparse"]
Boundary = Literal["clamp", "mask", "reflect"]

# float32 quotients of equal decimals can miss a whole number by an ulp or two: .02 / .001 must
# floor to 20.
_FLOOR_TOLERANCE = 1e-6
_RESOLUTION = 24  # binary digits of a traced probability


class Stencil(eqx.Module):
    """A direction for one array, described.

    Attributes:
        key: a key for the draws of every row, in the array's shape less its last axis; in a
            rank-one stencil the rows of one matrix share theirs.
        rows: a sign for every row, -1 or 1: random in a rank-one stencil, and times the side (+ or
            -) of the query, so that the two sides differ in nothing else.
        width: mu / s in codes, not yet floored, in the shape of the array's scale.
        support_key: a key for the support of every row, or None where every entry is in it.
        probability: chance of an entry to be in the support, in the shape of the scale, or None for
            1.
        digits: binary digits that represent `probability`, at most 24.
        law: the law of an entry.
        structure: how entries hang together.
        boundary: what happens at the grid's edges.
    """

    key: Key[Array, "..."]
    rows: Int8[Array, "..."]
    width: Float[Array, "..."]
    support_key: Key[Array, "..."] | None
    probability: Float[Array, "..."] | None
    digits: int = eqx.field(static=True)
    law: Law = eqx.field(static=True)
    structure: Structure = eqx.field(static=True)
    boundary: Boundary = eqx.field(static=True)

    def flipped(self, side: Int8[Array, ""]) -> Stencil:
        """The stencil of `side * u`, side in {-1, 1}."""
        return dataclasses.replace(self, rows=self.rows * side)


def describe(
    key: Key[Array, ""],
    array: QuantizedArray,
    width: Float[Array, "..."] | float,
    *,
    law: Law = "uniform",
    structure: Structure = "dense",
    boundary: Boundary = "clamp",
    density: Float[Array, ""] | float = 1.0,
    dithered: bool = False,
) -> Stencil:
    """Describe a direction for `array`.

    Args:
        key: a key of this array, this step and this query alone.
        array: the array to be probed.
        width: mu / s in codes, broadcastable to `array.scale`.
        law: law of an entry.
        structure: how entries hang together.
        boundary: what happens at the grid's edges.
        density: expected fraction of the support, in (0, 1], for structure="sparse".
        dithered: where `width < 1`, keep an entry with probability `width` instead of widening its
            reach to one whole code.

    Returns:
        The stencil: about twenty bytes a row.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> array = Quantizer(range=1.0)(jnp.zeros((2, 3)))
        >>> draw(describe(jax.random.key(0), array, 2.0), array).shape
        (2, 3)
    """
    rows = array.codes.shape[:-1]
    shape = array.scale.shape
    width = jnp.broadcast_to(jnp.asarray(width, jnp.float32), shape)
    draw_key, sign_key, support_key = jax.random.split(key, 3)
    if structure == "rank_one" and rows:
        keys = jnp.broadcast_to(jax.random.split(draw_key, rows[:-1])[..., None], rows)
        row_signs = _per_row(signs, jax.random.split(sign_key, rows[:-1]), rows[-1])
    else:
        keys = jax.random.split(draw_key, rows)
        row_signs = jnp.ones(rows, jnp.int8)
    probability, digits = None, _RESOLUTION
    if structure == "sparse":
        probability, digits = jnp.full(shape, density, jnp.float32), _digits(density)
    if dithered:
        kept = jnp.minimum(width, 1.0)
        probability = kept if probability is None else kept * probability
        digits = _RESOLUTION
    support_keys = None if probability is None else jax.random.split(support_key, rows)
    return Stencil(
        keys, row_signs, width, support_keys, probability, digits, law, structure, boundary
    )


def draw(stencil: Stencil, array: QuantizedArray) -> Int32[Array, "..."]:
    """The direction that a stencil describes, in codes, in the shape of `array`.

    Under boundary="mask" the entries that would leave the grid on either side are zero.
    """
    shape = array.codes.shape
    if array.codes.size == 0:
        return jnp.zeros(shape, jnp.int32)
    u = _entries(stencil, array) * stencil.rows.astype(jnp.int32)[..., None]
    if stencil.support_key is not None and stencil.probability is not None:
        probability = array.spread(stencil.probability)
        support = bernoulli(stencil.support_key, probability, u.shape[-1], stencil.digits)
        u = jnp.where(support, u, 0)
    u = u.reshape(shape)
    if stencil.boundary == "mask":
        u = jnp.where(_both_sides_fit(array.codes, u, array.grid), u, 0)
    return u


def displace(
    codes: Integer[Array, "..."], u: Int32[Array, "..."], grid: Grid, boundary: Boundary
) -> Int32[Array, "..."]:
    """The legal codes that `codes + u` becomes at the grid's edges.

    Under "mask" a coordinate whose other side, `codes - u`, would leave the grid stays as well.

    Examples:
        >>> grid = Grid((0.0, 1.0, 2.0, 3.0), 0, 3)
        >>> codes, u = jnp.array([0, 2, 3]), jnp.array([-1, 2, 1])
        >>> [displace(codes, u, grid, how).tolist() for how in ("clamp", "mask", "reflect")]
        [[0, 3, 3], [0, 2, 3], [1, 2, 2]]
    """
    n = codes.astype(jnp.int32)
    moved = n + u
    if boundary == "mask":
        return jnp.where(_both_sides_fit(codes, u, grid), moved, n)
    if boundary == "reflect":
        moved = jnp.where(moved > grid.high, 2 * grid.high - moved, moved)
        moved = jnp.where(moved < grid.low, 2 * grid.low - moved, moved)
    return jnp.clip(moved, grid.low, grid.high)


def reach(width: Float[Array, "..."], grid: Grid) -> Int32[Array, "..."]:
    """ZOQO's m = max(floor(mu / s), 1), with a tolerance for the floor, at most the grid's width.

    Examples:
        >>> grid = Grid(tuple(map(float, range(256))), 0, 255)
        >>> reach(jnp.float32(0.02) / jnp.float32(0.001), grid).item()
        20
    """
    widest = float(grid.high - grid.low)
    return jnp.clip(jnp.floor(width * (1.0 + _FLOOR_TOLERANCE)), 1.0, widest).astype(jnp.int32)


def dithered_reach(
    key: Key[Array, ""], width: Float[Array, "..."], array: QuantizedArray
) -> Int32[Array, "..."]:
    """floor(width + U), U uniform in [0, 1) for each coordinate: `width` codes on average.

    Args:
        key: a key for these draws alone.
        width: in codes, in the shape of `array.scale`.
        array: whose coordinates.
    """
    shape = array.codes.shape
    whole = jnp.clip(jnp.floor(width * (1.0 + _FLOOR_TOLERANCE)), 0.0, float(array.grid.high))
    rest = array.spread(jnp.clip(width - whole, 0.0, 1.0))
    up = bernoulli(jax.random.split(key, shape[:-1]), rest, shape[-1] if shape else 1)
    return array.spread(whole).astype(jnp.int32) + up.reshape(shape).astype(jnp.int32)


def check(law: str, structure: str, boundary: str, density: Array | float) -> None:
    """Refuse choices that no stencil can have.

    Raises:
        ValueError: an unknown name, a density outside (0, 1], or one for a structure that is not
        sparse.
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
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {density}.")
    if density != 1.0 and structure != "sparse":
        raise ValueError(
            f"density={density} needs structure='sparse', got structure={structure!r}."
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a name that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")


def signs(key: Key[Array, ""], count: int) -> Int8[Array, " count"]:
    """Independent fair signs, -1 or 1, 32 from each random word.

    Examples:
        >>> sorted(set(signs(jax.random.key(0), 100).tolist()))
        [-1, 1]
    """
    return (2 * _unpack(_random_words(key, -(-count // 32)), count) - 1).astype(jnp.int8)


def bernoulli(
    keys: Key[Array, "..."],
    probability: Float[Array, "..."] | float,
    columns: int,
    digits: int = _RESOLUTION,
) -> Bool[Array, "..."]:
    """Independent draws that are true with a given probability.

    Where a row of at least 32 draws shares its probability, `digits` random words make 32 draws by
    bit slicing: going up p's binary digits, OR with a random word where the digit is 1, AND where
    it is 0. Elsewhere a word makes one draw.

    Args:
        keys: one for each row.
        probability: in [0, 1], broadcastable to the rows' shape and one more axis; exact to
            2^-digits.
        columns: length of a row.
        digits: binary digits, at most 24.

    Returns:
        Draws in the shape of `keys` and one more axis.

    Examples:
        >>> draws = bernoulli(jax.random.key(0), 0.25, 100_000)
        >>> round(draws.mean().item(), 2)
        0.25
    """
    p = jnp.asarray(probability, jnp.float32)
    p = p if p.ndim else p[None]
    if columns >= 32 and p.shape[-1] == 1:
        whole = jnp.round(p * 2.0**digits).astype(jnp.uint32)
        words = -(-columns // 32)

        def add_digit(digit: Array, below: Array) -> Array:
            word = _per_row(
                lambda k, n: _random_words(jax.random.fold_in(k, digit), n), keys, words
            )
            return jnp.where((whole >> digit) & 1, below | word, below & word)

        below = jnp.zeros((*keys.shape, words), jnp.uint32)
        below = jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(digits), add_digit, below)
        below = jnp.where(whole >> digits, jnp.uint32(0xFFFFFFFF), below)
        return _unpack(below, columns).astype(bool)
    words = _per_row(_random_words, keys, columns)
    return (words >> 8).astype(jnp.float32) * 2.0**-24 < p


def _entries(stencil: Stencil, array: QuantizedArray) -> Int32[Array, "..."]:
    """Draws of the law, before row signs and support; rank-one rows of a matrix share one draw."""
    columns = array.codes.shape[-1] if array.codes.ndim else 1
    shared = stencil.structure == "rank_one" and array.codes.ndim >= 2
    keys = stencil.key[..., :1] if shared else stencil.key
    width = array.spread(stencil.width)
    m = reach(width, array.grid)
    if stencil.law == "rademacher":
        return m * _per_row(signs, keys, columns).astype(jnp.int32)
    bits = 16 if len(array.grid.levels) <= 16 else 32
    words = _per_row(lambda key, n: _random_words(key, n, bits), keys, columns)
    size = _uniform_size if stencil.law == "uniform" else _gaussian_size
    magnitude = size(words >> 1, bits - 1, m, width)
    return jnp.where(words & 1, -magnitude, magnitude)  # a fair sign: the law is exactly symmetric


def _uniform_size(random: Array, bits: int, m: Array, width: Array) -> Int32[Array, "..."]:
    """|k| of a uniform k on {-m .. m}, from whole numbers uniform on 0 .. 2^bits - 1."""
    del width
    count = (2 * m + 1).astype(jnp.uint32)
    if bits > 15:  # floor(random * count / 2^bits) without a 64-bit product
        low = random & 0x7FFF
        random, bits = (random >> 15) * count + ((low * count) >> 15), bits - 15
    else:
        random = random * count
    return ((random >> bits).astype(jnp.int32) + 1) >> 1


def _gaussian_size(random: Array, bits: int, m: Array, width: Array) -> Int32[Array, "..."]:
    """|k| of k on {-m .. m} with p(k) ~ exp(-k^2 / (2 width^2)), by inverting the distribution."""
    uniform = random.astype(jnp.float32) * 2.0**-bits

    def weight(k: Array) -> Array:
        both = jnp.where(k == 0, 1.0, 2.0)
        deviations = k.astype(jnp.float32) / width
        return jnp.where(k <= m, both * jnp.exp(-0.5 * deviations**2), 0.0)

    def invert(k: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        below, size = state
        below = below + weight(k) / total
        return below, size + (uniform >= below).astype(jnp.int32)

    widest = jnp.max(m)
    zero = jnp.zeros(jnp.broadcast_shapes(m.shape, width.shape), jnp.float32)
    total = jax.lax.fori_loop(0, widest + 1, lambda k, sum_: sum_ + weight(k), zero)
    size = jnp.zeros(jnp.broadcast_shapes(zero.shape, uniform.shape), jnp.int32)
    _, size = jax.lax.fori_loop(0, widest, invert, (zero, size))
    return jnp.minimum(size, m)


def _both_sides_fit(codes: Array, u: Array, grid: Grid) -> Bool[Array, "..."]:
    n, size = codes.astype(jnp.int32), jnp.abs(u)
    return (n + size <= grid.high) & (n - size >= grid.low)


def _per_row(draws: Callable[[Array, int], Array], keys: Array, columns: int) -> Array:
    rows = jax.vmap(lambda key: draws(key, columns))(keys.reshape(-1))
    return rows.reshape(*keys.shape, columns)


def _random_words(key: Array, count: int, bits: int = 32) -> UInt32[Array, " count"]:
    """Random words of 16 or 32 bits, two of the short ones from each long one.

    The dtype is said: the default is 64 bits wide under jax_enable_x64.
    """
    if bits == 32:
        return jax.random.bits(key, (count,), jnp.uint32)
    pairs = _random_words(key, -(-count // 2))
    return jnp.stack([pairs & 0xFFFF, pairs >> 16], axis=-1).reshape(-1)[:count]


def _unpack(words: UInt32[Array, "... words"], count: int) -> Int32[Array, "... count"]:
    """The first `count` bits of each row of words."""
    bits = (words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :count].astype(jnp.int32)


def _digits(density: Array | float) -> int:
    """The fewest binary digits that hold a known density exactly, or all of them."""
    if isinstance(density, Array | Tracer):
        return _RESOLUTION
    exact = (k for k in range(1, _RESOLUTION) if float(density * 2.0**k).is_integer())
    return next(exact, _RESOLUTION)

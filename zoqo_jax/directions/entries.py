"""Entries of directions: from random words to draws of a distribution, one for each code.

Streams of random words are numbered here, so that no two uses share one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int16

from zoqo_jax.grids import projection
from zoqo_jax.xla import compiler, random_bits
from zoqo_jax.xla.random_bits import Rows

__all__ = ["ENTRY", "PLACE", "SIGN", "SUPPORT", "asked", "from_rows", "of"]

SIGN, ENTRY, PLACE, SUPPORT, *_ROUNDINGS = range(6)
"""Streams of random words: a row's sign, entries, places of entries, who is in the support, and two
roundings."""


def of(
    draw: Callable[[str, int], Array],
    m: Array,
    width: Array,
    distribution: str,
    rounding: int | None,
) -> Int16[Array, "*rows columns"]:
    """Draws of a distribution.

    Args:
        draw: `draw(kind, stream)` gives "signs", or "words", for every draw.
        m: radius in whole codes, broadcastable to the draws.
        width: radius in codes, not floored.
        distribution: of an entry.
        rounding: which of two independent roundings of a real number, or None for whole numbers.
    """
    is_signs = distribution == "rademacher"
    bits = draw("signs" if is_signs else "words", ENTRY)
    if rounding is not None:
        real = bits.astype(jnp.float32) if is_signs else random_bits.gaussian(bits)
        chances = draw("words", _ROUNDINGS[rounding])
        return projection.stochastic(chances, width * real).astype(jnp.int16)
    if is_signs:
        return m * bits.astype(jnp.int16)
    size = _uniform_size if distribution == "uniform" else _gaussian_size
    magnitude = size(bits >> 1, m, width)
    return jnp.where(bits & 1, -magnitude, magnitude)  # a fair sign: exactly symmetric


def from_rows(rows: Rows, columns: int, kept: bool = False) -> Callable[[str, int], Array]:
    """What `of` draws with: so many random signs or words for each row, words kept in memory."""
    words = random_bits.kept_words if kept else random_bits.words
    by_kind = {"signs": random_bits.signs, "words": words}
    return lambda kind, stream: by_kind[kind](rows, columns, stream)


def asked(distribution: str, rounding: int | None, count: int) -> dict[int, tuple[int, int]]:
    """The words that `of` draws for `count` entries of a row, as `random_bits.ahead` wants them."""
    streams = {ENTRY: (1, -(-count // 32) if distribution == "rademacher" else count)}
    return streams if rounding is None else {**streams, _ROUNDINGS[rounding]: (1, count)}


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

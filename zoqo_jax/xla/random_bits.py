"""Random bits for the rows of an array, each a function of a key, a row and a place in the row.

Nothing is ever stored: a forward pass and the update that follows make the same bits again. The
generator is JAX's own, Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", 2011), but written as plain arithmetic on counters, so that XLA fuses it into what
uses the bits. `jax.random.bits` is five times slower a word on a CPU and as slow to compile.

One row's bits do not depend on which other rows there are, so a slice of a stack of layers has the
bits that the whole stack has for it. A row is the last axis of an array.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int8, Int32, Integer, Key, UInt32

from zoqo_jax.xla import compiler
from zoqo_jax.xla.chunks import in_chunks

__all__ = [
    "PART",
    "RESOLUTION",
    "Rows",
    "ahead",
    "at_once",
    "below",
    "bernoulli",
    "gaussian",
    "of_bernoulli",
    "part",
    "rows",
    "shared",
    "signs",
    "signs_in",
    "threefry",
    "whole",
    "words",
]

RESOLUTION = 24  # binary digits of a probability that is not known beforehand

_THREEFRY = "threefry2x32"
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PART = 30  # where a row's number ends and that of its part begins
_MANY_WORDS = 2**15
_PARITY = np.uint32(0x1BD11BDA)


class Rows(eqx.Module):
    """Where the bits of every row of an array come from; 12 bytes a row, mostly never stored.

    Attributes:
        key0: first word of the array's key, for every row the same.
        key1: second word.
        index: the row's number in the whole array, less than 2^30 - 1.
    """

    key0: UInt32[Array, "*rows"]
    key1: UInt32[Array, "*rows"]
    index: UInt32[Array, "*rows"]


class Drawn(Rows):
    """Rows some of whose words are in memory already.

    Attributes:
        ahead: for each of some streams, its words (*rows, count).
    """

    ahead: dict[int, UInt32[Array, "*rows count"]] = eqx.field(kw_only=True)


def threefry(key: Any) -> Key[Array, "..."]:
    """The Threefry key of a run, whatever generator the user's key is of.

    Under `jax.vmap` the generators "rbg" and "unsafe_rbg" draw other bits than one by one, so an
    update would not move along the direction that was probed. `jax.random.key(seed, impl="rbg")`
    gives the key of `jax.random.key(seed)`.

    Args:
        key: a typed key, or words of an old one (uint32); more axes stand for more keys.

    Returns:
        A typed key; a Threefry key as it is.

    Raises:
        ValueError: it is no key.

    Examples:
        >>> of_rbg = threefry(jax.random.key(3, impl="rbg"))
        >>> bool(of_rbg == jax.random.key(3, impl="threefry2x32"))
        True
    """
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        if str(jax.random.key_impl(key)) == _THREEFRY:
            return key
        words = jax.random.key_data(key)
    elif dtype == jnp.uint32 and key.ndim and key.shape[-1] >= 2:
        words = jnp.asarray(key)
    else:
        raise ValueError(f"key must be a key such as jax.random.key(0), got {key!r}.")
    first = jax.random.wrap_key_data(words[..., :2], impl=_THREEFRY)
    others = [words[..., i] for i in range(2, words.shape[-1])]
    if not others:
        return first
    mixed = first
    for word in others:
        mixed = jnp.vectorize(jax.random.fold_in)(mixed, word)
    # An rbg key made of a seed is a Threefry key, twice.
    twice = words.shape[-1] == 4 and (words[..., :2] == words[..., 2:]).all(axis=-1)
    return jnp.where(twice, first, mixed)


def rows(key: Key[Array, ""], shape: tuple[int, ...]) -> Rows:
    """Rows for an array of this shape less its last axis.

    Examples:
        >>> rows(jax.random.key(0), (2, 3)).index.tolist()
        [[0, 1, 2], [3, 4, 5]]
    """
    data = jax.random.key_data(threefry(key))
    index = jnp.arange(np.prod(shape, dtype=int), dtype=jnp.uint32).reshape(shape)
    return Rows(jnp.broadcast_to(data[0], shape), jnp.broadcast_to(data[1], shape), index)


def part(of: Rows, i: Array | int) -> Rows:
    """The i-th of up to four parts of the same rows, each with bits of its own."""
    return dataclasses.replace(of, index=of.index | (jnp.asarray(i, jnp.uint32) << PART))


def whole(of: Rows) -> Rows:
    """The rows that a part is of."""
    return dataclasses.replace(of, index=of.index & jnp.uint32(2**PART - 1))


def shared(of: Rows) -> Rows:
    """A row of bits for all rows to share, each of its axes 1 long; for the same part."""
    first = (slice(0, 1),) * of.index.ndim
    one = jax.tree.map(lambda field: field[first], of)
    return dataclasses.replace(one, index=one.index | jnp.uint32(2**PART - 1))


def words(
    of: Rows, count: int, stream: int, start: Integer[Array, ""] | int = 0
) -> UInt32[Array, "*rows count"]:
    """Random words.

    Args:
        of: the rows.
        count: words for each row.
        stream: which of 64 independent streams.
        start: where in the stream, in pairs of words; a stream is 2^26 long.
    """
    if isinstance(of, Drawn):
        return jax.lax.dynamic_slice_in_dim(of.ahead[stream], start, count, axis=-1)
    return _words(of, *_counters(count, stream, start))


def ahead(of: Rows, counts: dict[int, tuple[int, int]]) -> Drawn:
    """Rows whose words of several streams are drawn at once, in one program instead of many.

    A draw is two hundred instructions, of which XLA makes a copy for every leaf. A step of 57
    leaves whose sparse directions draw their three streams one by one takes 1.45 times as long to
    trace and compile.

    Args:
        of: the rows.
        counts: for each stream how many times words are asked for, and how many each time. The
            k-th time they are to start at k times that number.

    Examples:
        >>> of = rows(jax.random.key(0), (2,))
        >>> drawn = ahead(of, {1: (1, 5), 2: (3, 4)})
        >>> bool((words(drawn, 4, 2, 8) == words(of, 4, 2, 8)).all())
        True
    """
    asked = [
        (stream, count, turn * count)
        for stream, (turns, count) in counts.items()
        for turn in range(turns)
    ]
    places, firsts = zip(*(_counters(n, s, at) for s, n, at in asked), strict=True)
    places, firsts = jnp.concatenate(places), jnp.concatenate(firsts)
    drawn = _kept(of, len(places), lambda some: _words(some, places, firsts))
    ends = np.cumsum([turns * count for turns, count in counts.values()])
    split = dict(zip(counts, jnp.split(drawn, ends[:-1], axis=-1), strict=True))
    return Drawn(of.key0, of.key1, of.index, ahead=split)


def at_once(asked: Sequence[tuple[Rows, int, int]]) -> list[UInt32[Array, "*rows count"]]:
    """Random words of several rows of one array, drawn by one program, and kept in memory.

    Args:
        asked: each time rows, words for each of them, and the stream, as of `words`.

    Examples:
        >>> of = rows(jax.random.key(0), (2, 3))
        >>> one, two = at_once([(of, 1, 0), (shared(of), 5, 1)])
        >>> bool((one == words(of, 1, 0)).all() & (two == words(shared(of), 5, 1)).all())
        True
    """
    shapes = [(*of.index.shape, count) for of, count, _ in asked]

    def counter(of: Rows, count: int, stream: int) -> list[Array]:
        of_rows = [field[..., None] for field in (of.key0, of.key1, of.index)]
        whole = jnp.broadcast_arrays(*of_rows, *_counters(count, stream, 0))
        return [x.reshape(-1) for x in whole]

    def drawn() -> Array:
        counters = (counter(*one) for one in asked)
        return _threefry(*map(jnp.concatenate, zip(*counters, strict=True)))

    words = compiler.materialized(drawn, asked[0][0].key0)
    pieces = jnp.split(words, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _counters(count: int, stream: int, start: Array | int) -> tuple[Array, Array]:
    """Second half of the counter of each word of a row, and whether it is the first of its pair."""
    half = np.uint32(-(-count // 2))  # the first words of all pairs, then the second
    number = jnp.arange(count, dtype=jnp.uint32)
    is_first = number < half
    place = jnp.asarray(start, jnp.uint32) + jnp.where(is_first, number, number - half)
    return place + np.uint32(stream << 26), is_first


def _words(of: Rows, place: Array, is_first: Array) -> UInt32[Array, "*rows count"]:
    place, is_first = (x.reshape((1,) * of.index.ndim + x.shape) for x in (place, is_first))
    key0, key1, index = (field[..., None] for field in (of.key0, of.key1, of.index))
    return _threefry(key0, key1, index, place, is_first)


def signs(of: Rows, count: int, stream: int) -> Int8[Array, "*rows count"]:
    """Independent fair signs, -1 or 1, 32 from each random word.

    Examples:
        >>> sorted(set(signs(rows(jax.random.key(0), ()), 100, 0).tolist()))
        [-1, 1]
    """
    return signs_in(kept_words(of, -(-count // 32), stream), count)


def signs_in(packed: UInt32[Array, "*rows words"], count: int) -> Int8[Array, "*rows count"]:
    """The signs, -1 or 1, that random words hold, 32 each."""
    return (2 * _unpack(packed, count).astype(jnp.int8) - 1).astype(jnp.int8)


def kept_words(of: Rows, count: int, stream: int) -> UInt32[Array, "*rows count"]:
    """Random words, kept in memory; those of a large array are written piece by piece in place.

    Where few words serve many entries this is faster: fused with what uses them, each would be half
    of a pair that is computed for it alone.
    """
    if isinstance(of, Drawn):
        return words(of, count, stream)
    return _kept(of, count, lambda some: words(some, count, stream))


def _kept(of: Rows, count: int, make: Callable[[Rows], Array]) -> UInt32[Array, "*rows count"]:
    shape = (*of.index.shape, count)
    rows, few = shape[0], max(_MANY_WORDS // max(math.prod(shape[1:]), 1), 1)
    like = jax.ShapeDtypeStruct(shape, jnp.uint32)
    if not of.index.ndim or few >= rows:
        return compiler.materialized(lambda: make(of), of.key0)

    def piece(start: Array) -> Array:
        return make(jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, few), of))

    return in_chunks(piece, rows, few, compiler.blank(of.key0, like))


def below(
    of: Rows, bound: int, count: int, stream: int, kept: bool = False
) -> Int32[Array, "*rows count"]:
    """Whole numbers uniform on 0 .. bound - 1, to within bound / 2^32; bound at most 2^16.

    Args:
        of: the rows.
        bound: what they are below.
        count: numbers for each row.
        stream: which of 64 independent streams.
        kept: whether to keep their random words in memory.

    Examples:
        >>> sorted(set(below(rows(jax.random.key(0), ()), 3, 100, 0).tolist()))
        [0, 1, 2]
    """
    random = (kept_words if kept else words)(of, count, stream)
    high, low = random >> 16, random & 0xFFFF  # random * bound / 2^32 without a 64-bit product
    return ((high * bound + ((low * bound) >> 16)) >> 16).astype(jnp.int32)


def bernoulli(
    of: Rows,
    probability: Float[Array, "..."] | float,
    count: int,
    stream: int,
    digits: int = RESOLUTION,
    kept: bool = False,
) -> Bool[Array, "*rows count"]:
    """Independent draws that are true with a given probability.

    Where a row of at least 32 draws shares its probability, `digits` random words make 32 draws by
    bit slicing: going up p's binary digits, OR with a random word where the digit is 1, AND where
    it is 0. Elsewhere a word makes one draw.

    Args:
        of: the rows.
        probability: in [0, 1], broadcastable to the rows' shape and one more axis; exact to
            2^-digits.
        count: draws for each row.
        stream: which of 64 independent streams.
        digits: binary digits, at most 24.
        kept: whether to keep in memory the words that make one draw each.

    Examples:
        >>> draws = bernoulli(rows(jax.random.key(0), ()), 0.25, 100_000, 0)
        >>> round(draws.mean().item(), 2)
        0.25
    """
    p = jnp.asarray(probability, jnp.float32)
    p = p if p.ndim else p[None]
    _, length = of_bernoulli(p.shape, count, digits)
    if length == count:
        word = (kept_words if kept else words)(of, count, stream)
        return (word >> 8).astype(jnp.float32) * 2.0**-24 < p
    whole = jnp.round(p * 2.0**digits).astype(jnp.uint32)

    def add_digit(digit: Array, lower: Array) -> Array:
        word = words(of, length, stream, digit * length)
        return jnp.where((whole >> digit) & 1, lower | word, lower & word)

    lower = compiler.zeros(jax.ShapeDtypeStruct((*of.index.shape, length), jnp.uint32), (of, p))
    lower = jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(digits), add_digit, lower)
    lower = jnp.where(whole >> digits, jnp.uint32(0xFFFFFFFF), lower)
    return _unpack(lower, count).astype(bool)


def of_bernoulli(shape: tuple[int, ...], count: int, digits: int) -> tuple[int, int]:
    """How many times `bernoulli` asks for words, and for how many, as `ahead` wants it.

    Args:
        shape: of the probability.
        count: draws for each row.
        digits: as there.
    """
    return (1, count) if count < 32 or shape[-1:] > (1,) else (digits, -(-count // 32))


def gaussian(words: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Standard Gaussian draws, one from each random word, float32; none beyond 5.5.

    Examples:
        >>> draws = gaussian(words(rows(jax.random.key(0), ()), 100_000, 0))
        >>> round(draws.mean().item(), 2), round(draws.std().item(), 2)
        (0.0, 1.0)
    """
    odd = 2 * (words >> 8).astype(jnp.int32) + (1 - 2**24)  # symmetric, and never 1
    draws = np.float32(2**0.5) * jax.lax.erf_inv(odd.astype(jnp.float32) * 2.0**-24)
    return jnp.clip(draws, -6.0, 6.0)  # or XLA would merge the factor with others that follow


@jax.jit  # traced once for every shape
def _threefry(key0: Array, key1: Array, x0: Array, x1: Array, is_first: Array) -> Array:
    """One of the two random words of each counter (x0, x1).

    XLA computes the pair for each anyway. First and second words laid end to end were two programs,
    and twice the instructions; this is one, which takes 0.4 to 1.1 of their time (2048 x 576).
    """
    keys = (key0, key1, key0 ^ key1 ^ _PARITY)
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << distance) | (x1 >> (32 - distance)))
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return jnp.where(is_first, x0, x1)


def _unpack(packed: UInt32[Array, "*rows words"], count: int) -> UInt32[Array, "*rows count"]:
    """The first `count` bits of each row of words."""
    digits = jnp.arange(32, dtype=jnp.uint32).reshape((1,) * packed.ndim + (32,))
    bits = (packed[..., None] >> digits) & 1
    return bits.reshape(*packed.shape[:-1], -1)[..., :count]

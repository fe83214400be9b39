"""The least that a step can cost on this machine: bytes it must move, operations it must do.

The model has three terms, each an amount of work over a rate measured in the same process:

- *memory*: codes and scales are read once for every pass over the model, and once more, and
  written, by the update. Decoded matrices count, written and read, only where one does not fit in
  the last cache. Activations do not count. The rate is that of adding 1 in place to as many bytes
  as all codes take: a model that stays in the last cache is read from there.
- *products*: 2 x weights x tokens for each evaluation, at the rate of one such product with floats
  that are in cache already.
- *decoding*: every decoded weight once. The rate is that of decoding one matrix that is in cache.

Memory traffic can overlap with arithmetic, so the floor is max(memory, products + decoding).
Passes and decoded matrices, for q queries:

| | passes that read the codes | decoded matrices | tokens in a product |
| --- | --- | --- | --- |
| forward | 1 | 1 | T |
| rank-one | 1 | 1, shared by all evaluations | 2 q T |
| dense, sparse | q | 2 q, one for each end point | T |

Not in the floor: drawing directions, norms, activations, losses, launching. They are what
"measured over floor" shows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import zoqo_jax as zq
from benchmarks import models, timing
from benchmarks.results import machine

__all__ = ["Rates", "bandwidth", "floor", "floors", "rates", "stored"]

_ACCELERATOR_CACHE = 32 * 2**20
_REPEATS = 8  # of a product or a decoding in one call
_MOST_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the machine does in a second.

    Attributes:
        bandwidth: bytes read or written.
        product: operations of a product, by its tokens.
        decode: codes of one matrix.
    """

    bandwidth: float
    product: dict[int, float]
    decode: float


def rates(storage: str, tokens: set[int], rows: int, columns: int, nbytes: int) -> Rates:
    """Measure the machine, at its best of some rounds.

    Args:
        storage: a key of `models.STORAGES`.
        tokens: of the products.
        rows: of a matrix.
        columns: of a matrix.
        nbytes: that all codes take: whether they fit in a cache decides the bandwidth.
    """
    w = jax.random.normal(jax.random.key(0), (rows, columns)) * rows**-0.5
    array = models.STORAGES[storage](w)
    stack = jnp.stack([array.packed] * _REPEATS)

    def products(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _REPEATS // 2, lambda i, x: (x @ w) @ v, x)

    def decode(into: jax.Array, stack: jax.Array) -> jax.Array:
        def one(into: jax.Array, packed: jax.Array) -> tuple[jax.Array, None]:
            del into
            return dataclasses.replace(array, packed=packed).materialise(), None

        return jax.lax.scan(one, into, stack)[0]

    product = {}
    for n in sorted(tokens):
        x = jax.random.normal(jax.random.key(1), (n, rows))
        product[n] = _rate(2.0 * n * rows * columns * _REPEATS, products, x, w, w.T)
    decoded = _rate(w.size * _REPEATS, decode, jnp.zeros_like(w), stack)
    return Rates(bandwidth(nbytes), product, decoded)


def bandwidth(nbytes: int) -> float:
    """Bytes read or written in a second, by adding 1 in place to so many bytes, at least 1 MiB."""
    numbers = jnp.zeros(max(nbytes, 2**20) // 4)
    return _rate(2.0 * numbers.nbytes, lambda x: x + 1, numbers)


def _rate(amount: float, fn: Any, carried: jax.Array, *fixed: Any) -> float:
    """The result goes into memory that is there already: fresh pages would cost more."""
    effort = timing.Effort(rounds=15, seconds=1.5, least=3)
    program = timing.Program(lambda x, *fixed: (fn(x, *fixed),), (carried,), fixed)
    return amount / min(timing.interleaved({"": program}, effort)[""])


def stored(params: Any) -> tuple[int, int, int]:
    """Of a quantized tree: weights, and bytes of codes and of scales."""
    arrays = [
        leaf for leaf in jax.tree.leaves(params, is_leaf=zq.is_quantized) if zq.is_quantized(leaf)
    ]
    weights = sum(array.size for array in arrays)
    codes = sum(array.packed.nbytes for array in arrays)
    scales = sum(
        leaf.nbytes for array in arrays for leaf in jax.tree.leaves((array.scale, array.offset))
    )
    return weights, codes, scales


def floor(
    params: Any, largest: int, tokens: int, structure: str | None, queries: int, at: Rates
) -> dict[str, float]:
    """Seconds of each term and of the floor.

    Args:
        params: the quantized tree.
        largest: weights of the largest matrix used at once.
        tokens: of one evaluation.
        structure: of the direction, or None for a plain forward pass.
        queries: query pairs of the step.
        at: the rates.
    """
    weights, codes, scales = stored(params)
    evaluations = 1 if structure is None else 2 * queries
    shared = structure in (None, "rank_one")
    passes = 1 if shared else queries
    decoded = weights * (1 if shared else evaluations)
    moved = passes * (codes + scales)
    if structure is not None:
        moved += 2 * codes + scales  # the update
    if 4 * largest > _cache():
        moved += 2 * 4 * decoded
    together = tokens * evaluations if structure == "rank_one" else tokens
    terms = {
        "memory": moved / at.bandwidth,
        "products": 2.0 * weights * tokens * evaluations / at.product[_rounded(together)],
        "decoding": decoded / at.decode,
    }
    return {**terms, "floor": max(terms["memory"], terms["products"] + terms["decoding"])}


def floors(
    storage: str, shape: models.Shape, params: Any, tokens: int, queries: int
) -> dict[str, dict[str, float]]:
    """The floor of a forward pass and of a step of each structure, with the rates behind them."""
    together = {_rounded(tokens), _rounded(2 * queries * tokens)}
    _, codes, _ = stored(params)
    at = rates(storage, together, shape.width, shape.hidden, codes)
    found = {
        structure or "forward": floor(params, shape.largest, tokens, structure, queries, at)
        for structure in (None, *models.STRUCTURES)
    }
    return {**found, "rates": dataclasses.asdict(at)}


def _rounded(tokens: int) -> int:
    """Rates do not change beyond this many tokens."""
    return min(tokens, _MOST_TOKENS)


def _cache() -> int:
    here = machine()
    if here["backend"] != "cpu":
        return _ACCELERATOR_CACHE
    return max(here["caches"].values(), default=_ACCELERATOR_CACHE)

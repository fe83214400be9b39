"""The fastest way from codes to floats on this machine: `python -m benchmarks.dequantization`.

Ways for a matrix of 8-bit codes, or of 4-bit codes two to a byte (the j-th byte of a row holds the
j-th code of its first half and, above, of its second):

- `arithmetic`: (code + lowest) x scale; uniform grids only;
- `select`: a tree of selections, one digit of the code at a time; 4 bits only;
- `gather`: look up a table of levels, as the compiler does it;
- `pairs`: look up both codes of a byte at once, in a table of 256 pairs; 4 bits only.

Each alone, which is bound by writing floats, and feeding a product with 32 tokens, which is what a
model does. `copy` and `product` are the same without decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from experiments.command import say

if __name__ == "__main__":
    say("benchmark dequantization: loading JAX")  # which the imports below take seconds for

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import results
from benchmarks.timing import Effort, Program, report_of
from zoqo_jax.grids import companders

__all__ = ["Cell", "measure"]

_SCALE = 0.01
Decode = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured together.

    Attributes:
        bits: of a code, 8 or 4.
        dtype: of the floats.
        tokens: of the product that is fed, or 0 for decoding alone.
        rows: of the matrix.
        columns: of the matrix.
    """

    bits: int
    dtype: str
    tokens: int
    rows: int = 2048
    columns: int = 2048


def cells(quick: bool) -> list[Cell]:
    """Everything to measure."""
    size = (512, 512) if quick else (2048, 2048)
    dtypes = ("float32",) if quick else ("float32", "bfloat16")
    return [Cell(b, dtype, t, *size) for dtype in dtypes for b in (8, 4) for t in (0, 32)]


def measure(cell: Cell, effort: Effort) -> dict[str, Any]:
    """Times of all ways of one cell."""
    dtype, per_byte = jnp.dtype(cell.dtype), 8 // cell.bits
    shape = (cell.rows, cell.columns // per_byte)
    packed = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    floats = jnp.ones((cell.rows, cell.columns), dtype)
    x = jnp.ones((cell.tokens, cell.rows), dtype)

    def program(decode: Decode, w: jax.Array) -> Program:
        """Its result goes into memory that is there already: fresh pages would cost more."""
        if cell.tokens:
            out = jnp.zeros((cell.tokens, cell.columns), dtype)
            return Program(lambda out, w, x: (x @ decode(w),), (out,), (w, x))
        return Program(lambda out, w: (decode(w),), (floats,), (w,))

    if cell.tokens:
        programs = {"product": program(lambda w: w, floats)}
    else:
        programs = {"copy": program(jnp.negative, floats)}
    for name, decode in ways(cell.bits, dtype).items():
        programs[name] = program(decode, packed)
    return {"codes": cell.rows * cell.columns, **report_of(programs, effort)}


def ways(bits: int, dtype: Any) -> dict[str, Decode]:
    """How to decode, by name."""
    levels = np.arange(256, dtype=np.float32) - 128
    if bits == 4:
        levels = np.asarray(companders.nf4().levels, np.float32)
    scaled = levels * np.float32(_SCALE)

    def arithmetic(n: jax.Array) -> jax.Array:
        return ((n.astype(jnp.float32) - 2 ** (bits - 1)) * _SCALE).astype(dtype)

    def gather(n: jax.Array) -> jax.Array:
        table = jnp.asarray(scaled, dtype)
        return table.at[n.astype(jnp.int32)].get(mode="promise_in_bounds")

    def select(n: jax.Array) -> jax.Array:
        branches: list[Any] = list(levels)
        for digit in range(bits):
            odd = (n >> digit) & 1 != 0
            pairs = zip(branches[::2], branches[1::2], strict=True)
            branches = [jnp.where(odd, above, below) for below, above in pairs]
        return (branches[0] * _SCALE).astype(dtype)

    def pairs(byte: jax.Array) -> jax.Array:
        every = np.arange(256)
        table = jnp.asarray(np.stack([scaled[every & 15], scaled[every >> 4]], axis=-1), dtype)
        both = table.at[byte.astype(jnp.int32)].get(mode="promise_in_bounds")
        return jnp.concatenate([both[..., 0], both[..., 1]], axis=-1)

    def unpacked(decode: Decode) -> Decode:
        return lambda byte: decode(jnp.concatenate([byte & 15, byte >> 4], axis=-1))

    if bits == 8:
        return {"arithmetic": arithmetic, "gather": gather}
    by_code = {"arithmetic": arithmetic, "select": select, "gather": gather}
    return {**{name: unpacked(decode) for name, decode in by_code.items()}, "pairs": pairs}


if __name__ == "__main__":
    results.run("dequantization", cells, measure)

"""What a matrix costs as files have it, beside Q4_1: `python -m benchmarks.formats`.

A matrix of random codes in each format, with its scales of one level or two, its blocks or groups.
For each number of tokens the forward product and a whole step (`tx.update`, ZOQO with sparse
directions, and the addition) of every format take turns, so that their ratios are of one run. Codes
of 5 and 6 bits lie in two planes, and with act-order a column's group is looked up.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.command import say

if __name__ == "__main__":
    say("benchmark formats: loading JAX")  # which the imports below take seconds for

import jax
import jax.numpy as jnp
import numpy as np

import zoqo_jax as zq
from benchmarks import models, results
from benchmarks.timing import Effort, Program, report_of
from zoqo_jax.grids.scales import TwoLevel

__all__ = ["Cell", "measure"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured together.

    Attributes:
        tokens: of the product.
        rows: of the matrix, its outputs.
        columns: of the matrix, its inputs.
    """

    tokens: int
    rows: int = 2048
    columns: int = 2048


def cells(quick: bool) -> list[Cell]:
    """Everything to measure."""
    size = (512, 512) if quick else (2048, 2048)
    return [Cell(tokens, *size) for tokens in (32, 512)]


def measure(cell: Cell, effort: Effort) -> dict[str, Any]:
    """Times of all formats, and the bits that a code takes with its scales."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(cell.tokens, cell.columns)), jnp.float32)
    tx = models.transformation("sparse")

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.square(x @ params["w"].T).mean()

    def forward(out: jax.Array, params: Any, x: jax.Array) -> tuple[jax.Array]:
        return (out + zq.quaxify(lambda params: loss(params, x))(params),)

    programs, bits = {}, {}
    for name, array in _arrays(cell.rows, cell.columns).items():
        params = {"w": array}
        programs[f"{name} forward"] = Program(forward, (jnp.zeros(()),), (params, x))
        programs[f"{name} step"] = Program(models.step(tx, loss), (params, tx.init(params)), (x,))
        bits[name] = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(array)) / array.size
    return {"bits": bits, **report_of(programs, effort)}


def _arrays(rows: int, columns: int) -> dict[str, zq.QuantizedArray]:
    """A matrix in each format."""
    rng = np.random.default_rng(0)

    def made(bits: int, zero: int, length: int, scale: Any, offset: Any = None, **how: Any) -> Any:
        levels = tuple(float(n - zero) for n in range(2**bits))
        codes = jnp.asarray(rng.integers(0, 2**bits, (rows, columns)), jnp.uint8)
        grid, how = zq.Grid(levels, 0, 2**bits - 1), how or {"block": (-1, length)}
        return zq.QuantizedArray.from_codes(codes, scale, offset, grid, bits=bits, **how)

    def floats(length: int) -> jax.Array:
        halves = rng.normal(size=(rows, columns // length)) / columns
        return jnp.asarray(halves, jnp.float16)

    def whole(length: int, least: int, most: int, dtype: Any) -> np.ndarray:
        return rng.integers(least, most, (rows, columns // length)).astype(dtype)

    outer, group = floats(256), floats(128)
    two_level = TwoLevel.packed(outer, whole(32, 0, 64, np.uint8), 6)
    zeros = TwoLevel.packed(-group, whole(128, 0, 16, np.uint8), 4)
    order = jnp.asarray(rng.permutation(columns) // 128, jnp.int32)[None]
    return {
        "Q4_1": made(4, 0, 32, floats(32), floats(32)),
        "Q4_K": made(4, 0, 32, two_level, two_level),
        "Q5_0": made(5, 16, 32, floats(32)),
        "Q6_K": made(6, 32, 16, TwoLevel(outer, jnp.asarray(whole(16, -128, 128, np.int8)))),
        "Q8_0": made(8, 128, 32, floats(32)),
        "GPTQ": made(4, 0, 128, group, zeros),
        "GPTQ, act-order": made(4, 0, 128, group, zeros, block_of=order),
    }


if __name__ == "__main__":
    results.run("formats", cells, measure)

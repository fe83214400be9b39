"""Whether a device computes what it should: `python -m benchmarks.exactness`, for `gpu.sh`.

The checks are those of tests/, on the backend at hand, as compiled programs, and each leaves a
number behind. Run it with tests/ among the paths of PYTHONPATH.

- *Codes*: three steps of each method from given loss differences, against the hash of the codes
  that a CPU had (tests/codes.json): bit for bit.
- *Rule*: products in every layout, rows that are looked up, sliced and moved, and convolutions, of
  implicit arrays against their values in floats, displaced to both sides; also with the kernel.
- *Kernel*: its products against those of the values, with blocks that no tile divides and in the
  sizes of a model.

Products are in float32 (precision "highest"), and may differ by 2e-5 (rules: of 1 + the entry;
kernels: of the largest entry) as sums go in another order; what moves or picks rows by 1e-6, which
is a rounding of the scale times the level. The kernel is also compared at JAX's
default precision, where a GPU rounds factors to TF32, 11 bits: 4e-3 of the largest entry.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

from experiments.command import say

if __name__ == "__main__":
    say("benchmark exactness: loading JAX")  # which the imports below take seconds for

import jax
import jax.numpy as jnp
import numpy as np
import test_codes_stay as codes_stay
import test_kernels
import test_rules

from benchmarks import models, results
from benchmarks.device import kernels_on
from benchmarks.timing import TRACING, Effort
from experiments import footprint
from zoqo_jax.implicit import kernels

__all__ = ["Codes", "Kernel", "Rule", "measure"]

_FLOAT32, _TF32, _MOVED = 2e-5, 4e-3, 1e-6
_LARGE = {f"{name}, 576 x 1536": quantizer for name, quantizer in models.STORAGES.items()}


@dataclasses.dataclass(frozen=True)
class Codes:
    """Steps whose codes are those of a CPU.

    Attributes:
        case: a key of tests/codes.json.
    """

    case: str


@dataclasses.dataclass(frozen=True)
class Rule:
    """Operations on an implicit array.

    Attributes:
        what: a key of `_OPERATIONS`.
        grid: a key of `test_rules.GRIDS`.
        direction: a key of `test_rules.DIRECTIONS`.
        boundary: of the direction.
        kernels: whether products that the kernel takes are its.
    """

    what: str
    grid: str
    direction: str
    boundary: str = "clamp"
    kernels: bool = False


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A product by the kernel.

    Attributes:
        array: a key of `test_kernels.ARRAYS`, or of `_LARGE`.
        boundary: of the direction.
        transposed: whether the matrix is.
        dtype: of the factors.
        precision: "highest", or "default", which is TF32 on a GPU.
    """

    array: str
    boundary: str
    transposed: bool = False
    dtype: str = "float32"
    precision: str = "highest"


def cells(quick: bool) -> list[Any]:
    """Everything to check; kinds take turns, so that a run that is cut short has some of each."""
    boundaries = test_kernels.BOUNDARIES
    if quick:
        rule = Rule("products", "nf4", "rank_one", kernels=True)
        return [Kernel("nf4", "clamp"), rule, Codes("zoqo; columns; clamp; wide")]
    of_kernel = [
        *(
            Kernel(name, boundaries[i % 3], i % 2 == 1)
            for i, name in enumerate([*_LARGE, *test_kernels.ARRAYS])
        ),
        *(Kernel(name, "clamp", precision="default") for name in _LARGE),
        Kernel("nf4, 576 x 1536", "mask", dtype="bfloat16"),
    ]
    directions = list(test_rules.DIRECTIONS)
    of_rules = [
        *(Rule("products", grid, "rank_one", kernels=True) for grid in ("nf4", "blocks")),
        *(
            Rule(
                "layouts", grid, directions[(i + j) % len(directions)], boundaries[(i + 2 * j) % 3]
            )
            for j in range(2)
            for i, grid in enumerate(test_rules.GRIDS)
        ),
        *(
            Rule("rows_of", grid, directions[(i + 1) % len(directions)])
            for i, grid in enumerate(test_rules.GRIDS)
        ),
        *(Rule("convolutions", "crowded", direction) for direction in directions),
    ]
    structures = list(codes_stay.STRUCTURES)
    of_codes = [
        *codes_stay.WIDE,
        *(
            f"{method}; {structures[i % len(structures)]}; {boundaries[i % 3]}"
            for i, method in enumerate(codes_stay.METHODS)
        ),
    ]
    in_turns = itertools.zip_longest(of_kernel, of_rules, map(Codes, of_codes))
    return [cell for some in in_turns for cell in some if cell is not None]


def measure(cell: Codes | Rule | Kernel, effort: Effort) -> dict[str, Any]:
    """How far a cell is from what it should be; it is an error to be too far."""
    del effort
    if isinstance(cell, Codes):
        table = json.loads(codes_stay.TABLE.read_text())
        if codes_stay.outcome(cell.case) != table[cell.case]:
            raise ArithmeticError("the codes are not those that a CPU had")
        return {"error": 0.0, "at_most": 0.0}
    compared = _rule(cell) if isinstance(cell, Rule) else _kernel(cell)
    errors = {name: error / at_most for name, (error, at_most) in compared.items()}
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    if not max(errors.values()) <= 1.0:
        wrong = {name: compared[name] for name in errors if not errors[name] <= 1.0}
        told = "; ".join(
            f"{name} {error:.1e} > {most:.0e}" for name, (error, most) in wrong.items()
        )
        raise ArithmeticError(f"too far from the values' products: {told}")
    error, at_most = compared[worst]
    return {"error": error, "at_most": at_most, "of": worst}


Compared = dict[str, tuple[float, float]]  # errors, and what they may be


def _rule(cell: Rule) -> Compared:
    array = test_rules.GRIDS[cell.grid](test_rules.normal(0, *_SHAPES[cell.what]))
    fn = functools.partial(
        test_rules.over_sides_and_queries,
        _OPERATIONS[cell.what],
        direction=cell.direction,
        boundary=cell.boundary,
    )
    program = jax.jit(lambda array: fn(array, 1))
    with kernels_on() if cell.kernels else TRACING:
        lowered = program.lower(array)
    actual, expected = lowered.compile()(array)
    found = {}
    for name, right in expected.items():
        most = _MOVED if cell.what == "rows_of" else _FLOAT32
        if right.dtype == jnp.bfloat16:
            most = 2.0**-8
        one, other = (np.asarray(x, np.float64) for x in (actual[name], right))
        if not np.array_equal(np.isnan(one), np.isnan(other)):
            found[name] = (math.inf, most)
            continue
        error = np.abs(one - other) / (1 + np.abs(other))
        found[name] = (float(np.nan_to_num(error).max()), most)
    return found


def _products(w: Any) -> dict[str, jax.Array]:
    x = test_rules.normal(1, 2, 5, 16)
    first = jnp.einsum("io,sbi->osb", w, x)
    return {"x @ w": x @ w, "w first": first, "transposed": test_rules.normal(2, 3, 32) @ w.T}


def _convolutions(w: Any) -> dict[str, jax.Array]:
    def convolved(channels: int, groups: int, strides: tuple[int, int]) -> jax.Array:
        return jax.lax.conv_general_dilated(
            test_rules.normal(1, 2, 8, 8, channels),
            w,
            strides,
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    return {
        "plain": convolved(4, 1, (1, 1)),
        "strides": convolved(4, 1, (2, 1)),
        "groups": convolved(8, 2, (1, 1)),
    }


_OPERATIONS: dict[str, Callable[[Any], dict[str, jax.Array]]] = {
    "layouts": test_rules.layouts,
    "rows_of": test_rules.rows_of,
    "products": _products,
    "convolutions": _convolutions,
}
_SHAPES = {
    "layouts": (6, 10, 20),
    "rows_of": (6, 10, 20),
    "products": (16, 32),
    "convolutions": (3, 3, 4, 6),
}


def _kernel(cell: Kernel) -> Compared:
    dtype = jnp.dtype(cell.dtype)
    if cell.array in _LARGE:
        floats = test_kernels.normal(0, 576, 1536).astype(dtype)
        array, tokens, tiles = _LARGE[cell.array](floats), 32, None
        rng = np.random.default_rng(1)
        a, b = (jnp.asarray(rng.choice([-1, 1], n), jnp.int8) for n in array.shape)
        m = jnp.ones(array.scale.shape, jnp.int16)
    else:
        array, a, b, m, tiles = test_kernels.make(cell.array, dtype.type)
        tokens = test_kernels.TOKENS
    x = test_kernels.normal(1, 2, tokens, array.shape[1 if cell.transposed else 0]).astype(dtype)
    product = functools.partial(
        kernels.rank_one_product,
        boundary=cell.boundary,
        transposed=cell.transposed,
        precision=None if cell.precision == "highest" else jax.lax.Precision.DEFAULT,
        tiles=tiles,
        interpret=jax.default_backend() == "cpu",
    )
    out = jax.jit(product)(x, array, a, b, m)
    right = test_kernels.expected(x, array, a, b, m, cell.boundary, cell.transposed)
    most = _FLOAT32 if cell.precision == "highest" else _TF32
    if dtype == jnp.bfloat16:
        most = 2.0**-8
    error = jnp.abs(out.astype(jnp.float32) - right).max() / jnp.abs(right).max()
    return {"product": (float(error), most)}


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    results.run("exactness", cells, measure, at_once=4 * footprint.cores())

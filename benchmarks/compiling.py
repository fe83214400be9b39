"""What a first step waits for: `python -m benchmarks.compiling`.

Seconds of processor, tracing included, for which JAX compiles the forward pass of a decoder of
floats whose layers are leaves of their own, and a step on its codes: 57 matrices, which is what
models have whose layers are not scanned. Nothing is taken from JAX's compilation cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from experiments.command import say

if __name__ == "__main__":
    say("benchmark compiling: loading JAX")  # which the imports below take seconds for

import jax
from jax.experimental.compilation_cache import compilation_cache

import zoqo_jax as zq
from benchmarks import results
from benchmarks.models import DECODERS, STORAGES, STRUCTURES, step, transformation
from benchmarks.timing import Effort

__all__ = ["Cell", "measure"]

_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured together.

    Attributes:
        method: the structure of ZOQO's directions, or "sized", the steps of `zq.zoqo(key=key)`.
        storage: how codes are kept.
        model: whose shape it has.
    """

    method: str
    storage: str = "uint4"
    model: str = "8M"


def cells(quick: bool) -> list[Cell]:
    """Everything to measure."""
    methods = ("sparse",) if quick else (*STRUCTURES, "sized")
    return [Cell(method, model="1M" if quick else "8M") for method in methods]


def measure(cell: Cell, effort: Effort) -> dict[str, Any]:
    """Seconds of processor of one cell, the least of two attempts each."""
    del effort  # nothing is repeated until it settles
    model = dataclasses.replace(DECODERS[cell.model], scanned=False)
    floats, batch = model.params(jax.random.key(0)), model.batch(_TOKENS)
    params = zq.quantize(floats, STORAGES[cell.storage])
    tx = zq.zoqo(key=jax.random.key(0)) if cell.method == "sized" else transformation(cell.method)
    state = tx.init(params)
    with _nothing_kept():
        seconds = {
            "forward": _seconds(model.loss, floats, batch),
            "step": _seconds(step(tx, model.loss), params, state, batch),
        }
    leaves = sum(zq.is_quantized(x) for x in jax.tree.leaves(params, is_leaf=zq.is_quantized))
    return {"leaves": leaves, "seconds": seconds}


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
    """Without JAX's compilation cache, which decides once whether it is used."""
    used = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", used)
        compilation_cache.reset_cache()


def _seconds(fn: Callable[..., Any], *args: Any) -> list[float]:
    """What tracing and compiling takes, without what an earlier attempt left in JAX's caches."""
    found = []
    for _ in range(2):
        jax.clear_caches()
        begin = time.process_time()
        jax.jit(lambda *args: fn(*args)).lower(*args).compile()
        found.append(time.process_time() - begin)
    return found


if __name__ == "__main__":
    results.run("compiling", cells, measure)

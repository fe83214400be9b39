"""What a step costs on an accelerator, kernel off and on: `python -m benchmarks.device`.

Few programs on large models, for `gpu.sh`: this is the one place that says which. Decoders of 135 M
and 1.3 B weights whose layers are scanned, in each storage, at 32 and 1,024 tokens. The forward
pass takes turns with whole steps of one query along rank-one, sparse and column directions; where
the plan has products for the kernel, rank-one steps are there once more with ZOQO_JAX_KERNELS=on.
With 64 queries a rank-one step takes turns with a forward pass of 128 batches.

Tracing takes one core some seconds a program and compiling as many cores as there are: so cells are
traced and compiled together, of shapes alone, and measured one after another when that is done.
Beside each stands the bandwidth of a copy of 2 GiB, measured before it. Products are as precise as
JAX has them by default: a GPU rounds their factors to TF32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

from experiments.command import say

if __name__ == "__main__":
    say("benchmark device: loading JAX")  # which the imports below take seconds for

import jax

import zoqo_jax as zq
from benchmarks import floor, models, results
from benchmarks.measured import KERNEL, OF_DEVICE
from benchmarks.timing import TRACING, Effort, Program, report_of
from experiments import footprint

__all__ = ["MODELS", "STRUCTURES", "Cell", "kernels_on", "measure"]

MODELS: dict[str, models.Shape] = {
    "135M": models.DECODERS["135M"],
    "1.3B": models.Decoder(24, 2048, 16, 16, 5504, 32_000),  # Sheared-LLaMA-1.3B, embedding = head
    "tiny": models.Net(layers=2, width=64, hidden=64, scanned=True),
}
STRUCTURES = tuple(name for name in OF_DEVICE if name != KERNEL)
_COPIED = 2**31  # bytes
_AT_ONCE = 8  # cells that are compiled together: all of one model


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured together.

    Attributes:
        model: a key of `MODELS`.
        storage: a key of `models.STORAGES`.
        tokens: of one evaluation.
        queries: query pairs a step.
    """

    model: str
    storage: str
    tokens: int
    queries: int = 1


def cells(quick: bool) -> list[Cell]:
    """Everything to measure, what matters most first."""
    if quick:
        return [Cell("tiny", "nf4", 32), Cell("tiny", "int8", 32, 4)]
    small, large = (
        [Cell(model, storage, tokens) for tokens in (32, 1024) for storage in models.STORAGES]
        for model in ("135M", "1.3B")
    )
    many = [Cell("135M", storage, 32, 64) for storage in ("int8", "uint4")]
    return [*small, *many, *large]


def measure(cell: Cell, effort: Effort) -> Callable[[], dict[str, Any]]:
    """Trace and compile a cell; what is returned measures it."""
    shape, make = MODELS[cell.model], _maker(cell.model, cell.storage)
    params = jax.eval_shape(make, jax.random.key(0))

    def forward(batches: int) -> tuple[Program, Callable[[Any], Any]]:
        batch = functools.partial(shape.batch, batches * cell.tokens)
        program = Program(zq.quaxify(shape.loss), (), (params, jax.eval_shape(batch)))
        return program, lambda params: ((), (params, batch()))

    def step(structure: Any) -> tuple[Program, Callable[[Any], Any]]:
        tx = models.transformation(structure, cell.queries, None)
        batch = functools.partial(shape.batch, cell.tokens)
        carried = (params, jax.eval_shape(tx.init, params))
        program = Program(models.step(tx, shape.loss), carried, (jax.eval_shape(batch),))
        return program, lambda params: ((params, tx.init(params)), (batch(),))

    is_many = cell.queries > 1
    begun = {"forward": forward(1)}
    if is_many:
        begun["forward_as_many"] = forward(2 * cell.queries)
    for structure in ("rank_one",) if is_many else STRUCTURES:
        begun[structure] = step(structure)
    with kernels_on():
        kernel = step("rank_one")
    if _text(kernel) != _text(begun["rank_one"]):
        begun[KERNEL] = kernel
    for program, _ in begun.values():
        program.compile()
    drawn = make.lower(jax.random.key(0)).compile()

    def finish() -> dict[str, Any]:
        params = drawn(jax.random.key(0))
        weights, codes, scales = floor.stored(params)
        for program, arguments in begun.values():
            program.begin(*arguments(params))
        is_large = cell.model != "tiny"
        copied = floor.bandwidth(_COPIED if is_large else codes)
        short = dataclasses.replace(effort, seconds=min(effort.seconds, 4.0))
        return {
            "parameters": weights,
            "bytes": {"codes": codes, "scales": scales},
            "bandwidth": copied,
            **report_of({name: program for name, (program, _) in begun.items()}, short),
        }

    return finish


@functools.cache
def _maker(model: str, storage: str) -> Any:
    """A program that draws a model's weights and quantizes them, so that floats come and go."""
    shape, quantizer = MODELS[model], models.STORAGES[storage]
    return jax.jit(lambda key: zq.quantize(shape.params(key), quantizer))


@contextlib.contextmanager
def kernels_on() -> Iterator[None]:
    """Trace with the kernel on, interpreted where there is no GPU."""
    name = "ZOQO_JAX_KERNELS"
    with TRACING:
        before = os.environ.get(name)
        os.environ[name] = "on" if jax.default_backend() == "gpu" else "interpret"
        try:
            yield
        finally:
            os.environ.pop(name)
            os.environ.update({} if before is None else {name: before})


def _text(begun: tuple[Program, Any]) -> str:
    return begun[0].lowered.as_text()


if __name__ == "__main__":
    results.run("device", cells, measure, at_once=min(_AT_ONCE, footprint.cores()))

"""A step beside a forward pass of the same quantized model: `python -m benchmarks.step`.

For each storage, number of tokens and number of queries, four programs take turns: the forward
pass, and whole steps (`tx.update` and `optax.apply_updates`, donated) with rank-one, sparse and
dense directions. Several queries of a rank-one direction are evaluated together
(query_batch=None), the others one after another, as memory asks.

The layers are stacked and scanned, which compiles in a few seconds; with int8, one query and 32
tokens they are also unrolled, as Flax modules are by default, which takes half a minute a program.
With one query the sides of a query are also evaluated "in turn". Many queries of many tokens come
last: a call takes up to half a minute, so they have two rounds, with 64 queries one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.command import say

if __name__ == "__main__":
    say("benchmark step: loading JAX")  # which the imports below take seconds for

import jax

import zoqo_jax as zq
from benchmarks import floor, models, results
from benchmarks.timing import Effort, Program, report_of
from zoqo_jax.directions import Structure

__all__ = ["Cell", "forward", "measure", "stepper"]

_MANY = 2**13  # tokens of all queries


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured together.

    Attributes:
        storage: a key of `models.STORAGES`.
        tokens: of one evaluation.
        queries: query pairs a step.
        scanned: whether the layers are stacked and scanned.
        tiny: whether the network is `models.TINY`.
        in_turn: whether the two sides of a query are evaluated one after the other.
    """

    storage: str
    tokens: int
    queries: int = 1
    scanned: bool = False
    tiny: bool = False
    in_turn: bool = False


def cells(quick: bool) -> list[Cell]:
    """Everything to measure."""
    if quick:
        some = [Cell(storage, 32) for storage in models.STORAGES]
        return [dataclasses.replace(cell, tiny=True) for cell in (*some, Cell("int8", 32, 8, True))]
    grid = [(32, 1), (1024, 1), (256, 1), (32, 8), (32, 64)]
    grid += [(256, 8), (1024, 8), (256, 64), (1024, 64)]
    together = [Cell(storage, *at, True) for at in grid for storage in models.STORAGES]
    in_turn = [
        Cell(storage, tokens, 1, True, in_turn=True)
        for tokens in (1024, 32)
        for storage in models.STORAGES
    ]
    return [*together[:6], *in_turn, *together[6:15], Cell("int8", 32), *together[15:]]


def measure(cell: Cell, effort: Effort) -> dict[str, Any]:
    """Times, memory and floors of one cell."""
    net = dataclasses.replace(models.TINY if cell.tiny else models.NET, scanned=cell.scanned)
    params = zq.quantize(net.params(jax.random.key(0)), models.STORAGES[cell.storage])
    batch = net.batch(cell.tokens)
    if cell.tokens * cell.queries >= _MANY:
        effort = dataclasses.replace(effort, least=2 if cell.queries < 64 else 1)
    programs = {"forward": forward(net, params, batch)}
    for structure in models.STRUCTURES:
        query_batch = None if structure == "rank_one" else 1
        programs[structure] = stepper(
            net, params, batch, structure, cell.queries, query_batch, in_turn=cell.in_turn
        )
    return {
        "parameters": net.weights,
        **report_of(programs, effort),
        "floors": floor.floors(cell.storage, net, params, cell.tokens, cell.queries),
    }


def forward(shape: models.Shape, params: Any, batch: Any) -> Program:
    """The forward pass of a model as it is stored."""
    return Program(zq.quaxify(shape.loss), (), (params, batch))


def stepper(
    shape: models.Shape,
    params: Any,
    batch: Any,
    structure: Structure,
    queries: int = 1,
    query_batch: int | None = 1,
    copy: bool = True,
    in_turn: bool = False,
) -> Program:
    """A whole step by the public interface."""
    tx = models.transformation(structure, queries, query_batch, in_turn)
    return Program(models.step(tx, shape.loss), (params, tx.init(params)), (batch,), copy)


if __name__ == "__main__":
    results.run("step", cells, measure)

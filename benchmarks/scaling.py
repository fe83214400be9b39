"""How a step grows with parameters and with queries: `python -m benchmarks.scaling`.

- *size*: decoders of 1 M to 135 M parameters at 32 tokens, 4-bit blocks, one query: the forward
  pass and a step of each structure;
- *queries*: the 21 M network, its layers scanned, in int8 at 32 tokens with 1 to 64 queries. A step
  of q rank-one queries stands beside one forward pass with 2 q times the batch, which is as many
  evaluations as the step makes, of one model that never moves. `together` evaluates all queries
  at once, `one_by_one` and `dense` one after another.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.command import say

if __name__ == "__main__":
    say("benchmark scaling: loading JAX")  # which the imports below take seconds for

import jax

import zoqo_jax as zq
from benchmarks import floor, models, results
from benchmarks.step import forward, stepper
from benchmarks.timing import Effort, Program, report_of

__all__ = ["Queries", "Size", "measure"]

_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Size:
    """One decoder.

    Attributes:
        decoder: a key of `models.DECODERS`.
        storage: a key of `models.STORAGES`.
    """

    decoder: str
    storage: str = "uint4"


@dataclasses.dataclass(frozen=True)
class Queries:
    """One number of queries.

    Attributes:
        queries: query pairs a step.
        storage: a key of `models.STORAGES`.
        tiny: whether the network is `models.TINY`.
    """

    queries: int
    storage: str = "int8"
    tiny: bool = False


def cells(quick: bool) -> list[Size | Queries]:
    """Everything to measure."""
    if quick:
        return [Size("1M"), Queries(4, tiny=True)]
    return [*map(Size, models.DECODERS), *map(Queries, (1, 4, 16, 64))]


def measure(cell: Size | Queries, effort: Effort) -> dict[str, Any]:
    """Times and memory of one cell."""
    return _size(cell, effort) if isinstance(cell, Size) else _queries(cell, effort)


def _size(cell: Size, effort: Effort) -> dict[str, Any]:
    decoder = models.DECODERS[cell.decoder]
    params = zq.quantize(decoder.params(jax.random.key(0)), models.STORAGES[cell.storage])
    batch = decoder.batch(_TOKENS)
    programs = {"forward": forward(decoder, params, batch)}
    for structure in models.STRUCTURES:
        programs[structure] = stepper(decoder, params, batch, structure)
    measured = report_of(programs, effort)
    floors = floor.floors(cell.storage, decoder, params, _TOKENS, 1)
    return {"parameters": decoder.weights, **measured, "floors": floors}


def _queries(cell: Queries, effort: Effort) -> dict[str, Any]:
    q = cell.queries
    net = dataclasses.replace(models.TINY if cell.tiny else models.NET, scanned=True)
    params = zq.quantize(net.params(jax.random.key(0)), models.STORAGES[cell.storage])
    batch = net.batch(_TOKENS)
    programs: dict[str, Program] = {
        "forward": forward(net, params, batch),
        "forward_as_many": forward(net, params, net.batch(2 * q * _TOKENS)),
        "together": stepper(net, params, batch, "rank_one", q, None),
        "one_by_one": stepper(net, params, batch, "rank_one", q, 1),
        "dense": stepper(net, params, batch, "dense", q, 1),
    }
    return {"parameters": net.weights, **report_of(programs, effort)}


if __name__ == "__main__":
    results.run("scaling", cells, measure)

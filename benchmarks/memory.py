"""What training needs beyond inference: `python -m benchmarks.memory`.

- *Process*: the peak resident memory of whole processes, each started for this: it loads stored
  codes and runs inference (the plain forward pass) or steps. `training / inference` of the 135 M
  decoder in 4 bits says whether a machine that runs a model can train it. XLA's compiler takes
  more than such a model does, and its memory stays with the process. So each process is run twice:
  the first compiles, the second finds its program in JAX's compilation cache, as a device would
  that ships with it. "Settled" is what the second holds after its steps, once what was freed is
  given back to the system. Float32 MeZO and Adam stand beside.
- *Growth*: temporary bytes that the compiled step asks for, by depth and by width of the network:
  they should follow the largest layer, not the model. Nothing is run for these.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from experiments.command import say

if __name__ == "__main__" and "ZOQO_JOB" not in os.environ:
    say("benchmark memory: loading JAX")  # which the imports below take seconds for

import jax
import jax.numpy as jnp
import numpy as np

import zoqo_jax as zq
from benchmarks import baselines, models, results, timing
from benchmarks.step import forward, stepper
from experiments import footprint

__all__ = ["Growth", "Process", "measure"]

_STEPS = 5
_ROLES = ("inference", *models.STRUCTURES)


@dataclasses.dataclass(frozen=True)
class Process:
    """Processes that are compared.

    Attributes:
        model: "net", the 21 M network, scanned, or a key of `models.DECODERS`.
        storage: a key of `models.STORAGES`.
        tokens: of one evaluation.
        roles: what they do, the first of them inference.
    """

    model: str
    storage: str
    tokens: int = 32
    roles: tuple[str, ...] = _ROLES


@dataclasses.dataclass(frozen=True)
class Growth:
    """One shape of the network.

    Attributes:
        layers: of the network.
        width: of the network; its hidden layer is 3.375 times as wide.
        scanned: whether its layers are scanned.
        storage: a key of `models.STORAGES`.
        tokens: of one evaluation.
    """

    layers: int
    width: int
    scanned: bool
    storage: str = "uint4"
    tokens: int = 32


def cells(quick: bool) -> list[Process | Growth]:
    """Everything to measure."""
    if quick:
        return [Process("1M", "uint4", roles=_ROLES[:2]), Growth(2, 256, scanned=True)]
    return [
        Process("135M", "uint4", roles=(*_ROLES, "mezo", "adam")),
        *(Process("net", storage) for storage in models.STORAGES),
        Process("net", "int8", 1024),
        *(Growth(layers, 512, scanned=True) for layers in (3, 6, 12, 24)),
        *(Growth(layers, 512, scanned=False) for layers in (2, 4)),
        *(Growth(12, width, scanned=True) for width in (128, 256, 1024)),
    ]


def measure(cell: Process | Growth, effort: timing.Effort) -> dict[str, Any]:
    """Memory of one cell."""
    del effort
    return _processes(cell) if isinstance(cell, Process) else _growth(cell)


def _growth(cell: Growth) -> dict[str, Any]:
    net = models.Net(cell.layers, cell.width, cell.width * 27 // 8, cell.scanned)

    def make(key: jax.Array) -> Any:
        return zq.quantize(net.params(key), models.STORAGES[cell.storage])

    params = jax.eval_shape(make, jax.random.key(0))
    batch = jax.eval_shape(lambda: net.batch(cell.tokens))
    memory = {"forward": timing.temporary(zq.quaxify(net.loss), (), (params, batch))}
    for structure in models.STRUCTURES:
        tx = models.transformation(structure)
        state = jax.eval_shape(tx.init, params)
        memory[structure] = timing.temporary(models.step(tx, net.loss), (params, state), (batch,))
    return {"parameters": net.weights, "largest": net.largest, "memory": memory}


def _processes(cell: Process) -> dict[str, Any]:
    shape = _shape(cell.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        params = zq.quantize(shape.params(jax.random.key(0)), models.STORAGES[cell.storage])
        leaves = jax.tree.leaves(params)
        for i, leaf in enumerate(leaves):
            np.save(folder / f"{i}.npy", leaf)
        stored = sum(leaf.nbytes for leaf in leaves)
        del params, leaves
        found = {
            role: {when: _start(cell, role, folder) for when in ("compiling", "compiled")}
            for role in cell.roles
        }
    return {"parameters": shape.weights, "stored": stored, "processes": found}


def _start(cell: Process, role: str, folder: Path) -> dict[str, Any]:
    """Run one process and return what it said; the second finds its program compiled."""
    job = {**dataclasses.asdict(cell), "role": role, "folder": str(folder)}
    cache = footprint.programs_in(folder / "compiled" / role)
    return footprint.child("benchmarks.memory", job, cache)


def _child(model: str, storage: str, role: str, tokens: int, folder: str, **_: Any) -> None:
    """The process that is measured."""
    shape = _shape(model)
    jnp.zeros(1).block_until_ready()
    empty = footprint.resident()["now"]
    batch = shape.batch(tokens)
    if role in ("mezo", "adam"):
        floats = shape.params(jax.random.key(0))
        program = getattr(baselines, role)(shape, floats, batch, copy=False)
        del floats
    else:
        params = _load(shape, storage, Path(folder))
        if role == "inference":
            program = forward(shape, params, batch)
        else:
            program = stepper(shape, params, batch, role, copy=False)
        del params
    for _step in range(_STEPS):
        program()
    peaks = footprint.resident()
    footprint.give_back()
    said = {
        "empty": empty,
        "settled": footprint.resident()["now"],
        **peaks,
        "program": program.memory,
        "compile_seconds": program.compile_seconds,
    }
    print(json.dumps(said))


def _load(shape: models.Shape, storage: str, folder: Path) -> Any:
    """The stored parameters, one leaf at a time."""
    quantizer = models.STORAGES[storage]
    like = jax.eval_shape(lambda: zq.quantize(shape.params(jax.random.key(0)), quantizer))
    leaves, treedef = jax.tree.flatten(like)
    loaded = [jnp.array(np.load(folder / f"{i}.npy")) for i in range(len(leaves))]
    return treedef.unflatten(loaded)


def _shape(model: str) -> models.Shape:
    if model == "net":
        return dataclasses.replace(models.NET, scanned=True)
    return models.DECODERS[model]


if __name__ == "__main__":
    if (job := footprint.job()) is not None:
        _child(**job)
    else:
        results.run("memory", cells, measure)

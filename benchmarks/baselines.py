"""A step beside other ways to train the same network: `python -m benchmarks.baselines`.

The programs that take turns:

- `forward`, `rank_one`, `dense`: as in `step.py`; `forward_float`: the same network in float32;
- `naive`: ZOQO as one writes it first: a tree of directions from `jax.random`, two displaced copies
  of the model, decoded, and the directions again for the update. Compiled as one program;
- `mezo`: float32 SPSA with Gaussian directions and SGD (`zq.spsa`, `optax.sgd`);
- `adam`: one step of Adam by back-propagation, float32;
- `by_hand` (int8): the arithmetic of the rank-one step without the library's interface: products,
  edges and update written for this very network. What the interface costs is `rank_one / by_hand`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from experiments.command import say

if __name__ == "__main__":
    say("benchmark baselines: loading JAX")  # which the imports below take seconds for

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import zoqo_jax as zq
from benchmarks import models, results
from benchmarks.step import forward, stepper
from benchmarks.timing import Effort, Program, report_of

__all__ = ["Cell", "adam", "by_hand", "measure", "mezo", "naive"]

_FEW = 4  # slices of a matrix with codes at the grid's edges that `by_hand` corrects at a time


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured together.

    Attributes:
        storage: a key of `models.STORAGES`.
        tokens: of one evaluation.
        tiny: whether the network is `models.TINY`.
    """

    storage: str
    tokens: int
    tiny: bool = False


def cells(quick: bool) -> list[Cell]:
    """Everything to measure."""
    if quick:
        return [Cell("int8", 32, tiny=True)]
    return [
        *(Cell(storage, 32) for storage in models.STORAGES),
        Cell("int8", 1024),
    ]


def measure(cell: Cell, effort: Effort) -> dict[str, Any]:
    """Times and memory of one cell."""
    net = models.TINY if cell.tiny else models.NET
    floats = net.params(jax.random.key(0))
    params = zq.quantize(floats, models.STORAGES[cell.storage])
    batch = net.batch(cell.tokens)
    programs = {
        "forward": forward(net, params, batch),
        "rank_one": stepper(net, params, batch, "rank_one"),
        "dense": stepper(net, params, batch, "dense"),
        "naive": Program(naive(net), (params, jax.random.key(0)), (batch,)),
        "forward_float": Program(net.loss, (), (floats, batch)),
        "mezo": mezo(net, floats, batch),
        "adam": adam(net, floats, batch),
    }
    if cell.storage == "int8":
        tx = models.transformation("rank_one")
        programs["by_hand"] = Program(by_hand(net, tx), (params, tx.init(params)), (batch,))
    return {"parameters": net.weights, **report_of(programs, effort)}


def naive(shape: models.Shape) -> Callable[..., Any]:
    """A step with directions, copies and updates as trees."""

    def step(params: Any, key: jax.Array, batch: Any) -> tuple[Any, jax.Array]:
        key, of_step = jax.random.split(key)
        leaves, treedef = jax.tree.flatten(params, is_leaf=zq.is_quantized)
        keys = jax.random.split(of_step, len(leaves))
        directions = [
            jax.random.rademacher(k, leaf.shape, jnp.int16) if zq.is_quantized(leaf) else None
            for k, leaf in zip(keys, leaves, strict=True)
        ]

        def moved(sign: Any) -> Any:
            """A copy of the model, displaced."""
            copies = [
                leaf if u is None else leaf.with_codes(_clipped(leaf, sign * u))
                for leaf, u in zip(leaves, directions, strict=True)
            ]
            return treedef.unflatten(copies)

        plus, minus = (shape.loss(zq.dequantize(moved(sign)), batch) for sign in (1, -1))
        return moved(-jnp.sign(plus - minus).astype(jnp.int16)), key

    return step


def mezo(shape: models.Shape, floats: Any, batch: Any, copy: bool = True) -> Program:
    """A step of MeZO in float32."""
    tx = optax.chain(
        zq.spsa(1e-3, key=jax.random.key(0), noise="gaussian"), optax.sgd(models.STRIDE)
    )
    return Program(models.step(tx, shape.loss), (floats, tx.init(floats)), (batch,), copy)


def adam(shape: models.Shape, floats: Any, batch: Any, copy: bool = True) -> Program:
    """A step of Adam by back-propagation in float32."""
    tx = optax.adam(models.STRIDE)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(shape.loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return Program(step, (floats, tx.init(floats)), (batch,), copy)


def by_hand(net: models.Net, tx: Any) -> Callable[..., Any]:
    """The rank-one step of an unrolled `Net` in int8, one scale a matrix, written out.

    Directions are the library's (`tx.probes`), so that both take the same step.
    """

    def step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any]:
        blocks = params["params"]
        leaves, treedef = jax.tree.flatten(params, is_leaf=zq.is_quantized)
        places = [i for i, leaf in enumerate(leaves) if zq.is_quantized(leaf)]
        arrays = [leaves[i] for i in places]
        probes = tx.probes(state, params)
        signs = {
            id(array): (probe.row_signs(), probe.column_signs(array))
            for array, probe in zip(arrays, probes, strict=True)
        }
        x = jnp.stack([batch, batch])
        for i in range(net.layers):
            block = blocks[f"_Block_{i}"]
            y = nn.LayerNorm().apply({"params": block["LayerNorm_0"]}, x)
            for name in ("Dense_0", "Dense_1"):
                array = block[name]["kernel"]
                y = nn.gelu(y) if name == "Dense_1" else y
                y = _both_sides(y, array, *signs[id(array)])
            x = x + y
        plus, minus = jnp.mean(x**2, axis=(1, 2))
        back = -jnp.sign(plus - minus).astype(jnp.int16)
        for i, array in zip(places, arrays, strict=True):
            a, b = signs[id(array)]
            u = a[:, None].astype(jnp.int16) * b
            leaves[i] = array.with_codes(_clipped(array, back * u))
        return treedef.unflatten(leaves), state._replace(count=state.count + 1)

    return step


def _both_sides(x: jax.Array, array: zq.QuantizedArray, a: jax.Array, b: jax.Array) -> jax.Array:
    """`x @ value(clip(n +- a b^T))` for the two sides that x holds, from one decoded matrix."""
    grid, codes = array.grid, array.codes
    scale = array.scale.reshape(()).astype(jnp.float32)
    sides = jnp.array([1.0, -1.0])[:, None]
    out = x @ (codes.astype(jnp.float32) * scale + grid.levels[0] * scale)
    along = (x @ a.astype(x.dtype)) * sides * scale
    out = out + along[..., None] * b.astype(x.dtype)
    highest, lowest = codes.max(axis=1), codes.min(axis=1)
    at_edge = (highest >= grid.high) | (lowest <= grid.low)

    def correct(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        remaining, out = carry
        found, rows = jax.lax.top_k(remaining.astype(jnp.float32), _FEW)
        n = codes[rows].astype(jnp.int16)
        u = (a[rows][:, None] * b).astype(jnp.int16) * sides[..., None].astype(jnp.int16)
        beyond = jnp.clip(n + u, grid.low, grid.high) - (n + u)
        some = x[..., rows] * found
        out = out + jnp.einsum("str,src->stc", some, beyond * scale)
        return remaining.at[rows].set(False), out

    return jax.lax.while_loop(lambda carry: carry[0].any(), correct, (at_edge, out))[1]


def _clipped(array: zq.QuantizedArray, u: jax.Array) -> jax.Array:
    moved = array.codes.astype(jnp.int16) + u.astype(jnp.int16)
    return jnp.clip(moved, array.grid.low, array.grid.high)


if __name__ == "__main__":
    results.run("baselines", cells, measure)

"""`observe`: what multiplies each quantized leaf, from one forward pass of an unmodified model.

It is written as a direction that goes nowhere: in a product it tells the host what the vectors are
like, and multiplies as if it were not there. So it sees what any product sees, in layers of a
scanned stack, in loops and under `jax.jit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int16, PRNGKeyArray, PyTree

from zoqo_jax.directions import Direction, Guide
from zoqo_jax.directions.matmul import Dot, Thresholds, depends_on
from zoqo_jax.grids.arrays import QuantizedArray, is_quantized, is_trained, trained_leaves
from zoqo_jax.implicit.arrays import PerturbedArray
from zoqo_jax.implicit.rules import quaxify
from zoqo_jax.xla import random_bits

__all__ = ["Observation", "observe"]


class Observation(NamedTuple):
    """What multiplies a leaf.

    Attributes:
        inputs: where the leaf has its inputs, "rows" (every axis but the last) or "columns".
        mean: of each input.
        energy: mean square of each input.
        sketches: sums of the vectors, each times a random sign of its own, over the root of their
            number: several independent ones.
        vectors: how many there were, for each layer.

    Examples:
        >>> import zoqo_jax as zq
        >>> params = {"w": zq.Quantizer()(jnp.ones((3, 2)))}
        >>> x = jnp.array([[4.0, -3.0, 0.0]])
        >>> guide = zq.observe(lambda params: jnp.sum(x @ params["w"]), params)["['w']"].guide
        >>> guide.weights.tolist(), guide.signs.tolist()
        ([4.0, 3.0, 0.0], [1, -1, 0])
    """

    inputs: Literal["rows", "columns"]
    mean: np.ndarray
    energy: np.ndarray
    sketches: np.ndarray
    vectors: int

    @property
    def guide(self) -> Guide:
        """Inputs in proportion to their root mean square, with the signs of their means."""
        weights = jnp.sqrt(jnp.asarray(self.energy))
        return Guide(weights, jnp.sign(jnp.asarray(self.mean)).astype(jnp.int8))


class _Observed(Direction):
    """A direction of zeros that tells `sink` of what multiplies its array."""

    sink: Any = eqx.field(static=True, default=None)
    leaf: str = eqx.field(static=True, default="")
    shape: tuple[int, ...] = eqx.field(static=True, default=())
    sketches: int = eqx.field(static=True, default=0)

    def draw(self, array: QuantizedArray) -> Int16[Array, "..."]:
        return jnp.zeros(array.shape, jnp.int16)

    def multiply(
        self, algorithms: tuple[str, ...], array: QuantizedArray, x: Array, dot: Dot, at: Thresholds
    ) -> Array:
        contracted, last = sorted(dot.contracted), array.ndim - 1
        is_of_rows = bool(contracted) and last not in contracted
        if (is_of_rows or contracted == [last]) and not dot.batched and x.size:
            of_x = [dot.x_axis(axis) for axis in contracted]
            vectors = jnp.moveaxis(x, of_x, range(-len(of_x), 0))
            sizes = vectors.shape[-len(of_x) :]
            vectors = vectors.reshape(-1, math.prod(sizes)).astype(jnp.float32)
            word = random_bits.words(self.rows, 1, 12).reshape(-1)[:1]
            rows = random_bits.Rows(word, word, jnp.zeros(1, jnp.uint32))
            signs = random_bits.signs(rows, self.sketches * len(vectors), 0)
            signs = signs.reshape(self.sketches, -1).astype(jnp.float32)
            sums = jnp.concatenate(
                [vectors.sum(0)[None], (vectors**2).sum(0)[None], signs @ vectors]
            )
            if is_of_rows:  # each contracted axis of the leaf, the others repeated
                whole = [n if axis in contracted else 1 for axis, n in enumerate(array.shape[:-1])]
                sums = jnp.broadcast_to(
                    sums.reshape(-1, *whole), (len(sums), *array.shape[:-1])
                ).reshape(len(sums), -1)
            where = self.rows.index.reshape(-1)[0]
            layers = len(self.shape) - array.ndim
            inputs = "rows" if is_of_rows else "columns"
            leading, rows = self.shape[:layers], self.shape[layers:-1]
            tell = self.sink.told(self.leaf, inputs, len(vectors), leading, math.prod(rows))
            jax.debug.callback(tell, where, sums)
        return dot(depends_on(x, array).materialise(), x)


class _Sink:
    """Sums by leaf, layer and part, on the host."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def told(
        self, leaf: str, inputs: str, count: int, leading: tuple[int, ...], rows: int
    ) -> Callable[[Any, Any], None]:
        """What the device calls with the first row's number and the sums of one product."""

        def tell(where: Any, sums: Any) -> None:
            where, sums = int(where), np.asarray(sums, np.float64)
            part, row = where >> random_bits.PART, where & ((1 << random_bits.PART) - 1)
            of_leaf = self.found.setdefault(leaf, {"inputs": inputs, "leading": leading, "by": {}})
            if of_leaf["inputs"] != inputs:
                return  # used both ways; its first use counts
            key = (row // max(rows, 1), part)
            total, vectors = of_leaf["by"].get(key, (0.0, 0))
            of_leaf["by"][key] = (total + sums, vectors + count)

        return tell


def observe(
    value_fn: Callable[[Any], Any],
    params: PyTree,
    *,
    sketches: int = 4,
    key: PRNGKeyArray | None = None,
) -> dict[str, Observation]:
    """Watch what multiplies each quantized leaf while an objective is evaluated once.

    Args:
        value_fn: `value_fn(params)`, any function of the parameters; its result is not looked at.
        params: tree with quantized leaves; frozen ones are left out.
        sketches: how many random sign sketches to make.
        key: of their signs; by default that of seed 0.

    Returns:
        By the leaf's path; leaves that no matrix product takes are missing. Give it to `update` as
        `guides=` of a method with structure="columns", for "rows" or "columns" as it says.

    Raises:
        ValueError: no quantized leaf, or fewer than one sketch.

    Examples:
        >>> import zoqo_jax as zq
        >>> params = zq.quantize({"w": jnp.ones((3, 2))}, zq.Quantizer())
        >>> x = jnp.array([[1.0, 2.0, 0.0], [1.0, -2.0, 0.0]])
        >>> seen = zq.observe(lambda params: jnp.sum(x @ params["w"]), params)["['w']"]
        >>> seen.inputs, seen.mean.tolist(), seen.energy.tolist(), seen.vectors
        ('rows', [1.0, 0.0, 0.0], [1.0, 4.0, 0.0], 2)
    """
    if sketches < 1:
        raise ValueError(f"sketches must be at least 1, got {sketches}.")
    leaves = list(trained_leaves(params))
    key = random_bits.threefry(jax.random.key(0) if key is None else key)
    sink = _Sink()

    def watched(path: Any, leaf: Any) -> Any:
        if not is_trained(leaf):
            return leaf
        name = jax.tree_util.keystr(path)
        own = {"sink": sink, "leaf": name, "shape": leaf.shape, "sketches": sketches}
        leaf_key = jax.random.fold_in(key, leaves.index(name))
        return PerturbedArray(leaf, _Observed.describe(leaf_key, leaf, 1.0, **own))

    @jax.jit
    def run(arrays: Any) -> Any:
        tree = eqx.combine(arrays, rest)
        tree = jax.tree_util.tree_map_with_path(watched, tree, is_leaf=is_quantized)
        out = quaxify(value_fn)(tree)
        return [leaf for leaf in jax.tree.leaves(out) if isinstance(leaf, jax.Array)]

    arrays, rest = eqx.partition(params, eqx.is_array)
    jax.block_until_ready(run(arrays))
    jax.effects_barrier()
    return {name: _observation(**sink.found[name]) for name in leaves if name in sink.found}


def _observation(inputs: Any, leading: tuple[int, ...], by: dict[Any, Any]) -> Observation:
    """What was seen of a leaf, its layers and the parts of its columns put together."""
    layers = sorted({layer for layer, _ in by})
    vectors = by[layers[0], 0][1]
    parts = sorted({part for _, part in by})
    if inputs == "rows":  # every part met the same vectors
        parts = parts[:1]

    def of_layer(layer: int) -> np.ndarray:
        return np.concatenate([by[layer, part][0] / by[layer, part][1] for part in parts], axis=-1)

    sums = np.stack([of_layer(layer) for layer in layers], axis=1)
    shape = (*leading, sums.shape[-1]) if len(layers) == math.prod(leading) else sums.shape[1:]
    mean, energy, *drawn = sums.reshape(len(sums), *shape).astype(np.float32)
    return Observation(inputs, mean, energy, np.stack(drawn) * np.float32(vectors**0.5), vectors)

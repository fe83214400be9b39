"""Queries: the losses at `n + u` and `n - u` of a plain `value_fn(params)`, no copy of the model.

A query pair is one vectorised evaluation of the objective over the side, +1 and -1, with every
quantized leaf replaced by an implicit array (`implicit.py`); what does not depend on the side is
computed once.

Where there is no loss, a plain `compare_fn(a, b)` tells which side is better (`verdicts`).
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import quax
from jaxtyping import Array, Float, Float32, Int32, Integer, Key, PyTree

from zoqo_jax.directions import Direction
from zoqo_jax.grids.arrays import is_quantized, is_trained
from zoqo_jax.implicit.arrays import PerturbedArray
from zoqo_jax.implicit.rules import quaxify

__all__ = [
    "Comparator",
    "Objective",
    "Sides",
    "differences",
    "endpoints",
    "losses",
    "scalar",
    "verdicts",
    "whole",
]

Objective = Callable[[Any], Float[Array, ""]]
"""A loss: `value_fn(params) -> scalar`."""

Comparator = Callable[..., Any]
"""A judge: `compare_fn(a, b)`, or `compare_fn(a, b, key)`, -> -1, 0 or 1."""

Sides = Literal["together", "in_turn"]
"""How the two sides of a query are evaluated."""


def losses(
    value_fn: Objective,
    params: PyTree,
    directions: Sequence[Direction],
    *,
    center: bool = False,
    together: int = 1,
    sides: Sides = "together",
) -> Float32[Array, "sides ..."]:
    """Evaluate an objective at both sides of a direction.

    Args:
        value_fn: `value_fn(params) -> scalar`, made of JAX operations; sees floats.
        params: tree with quantized leaves; frozen and other leaves are not displaced.
        directions: one for each trained leaf, in the order of the tree.
        center: evaluate at the present codes too.
        together: how many directions `jax.vmap` evaluates at once, this one among them: it decides
            how products are computed, not what they are.
        sides: evaluate + and - "together", as a batch that shares what it can, or "in_turn", which
            has one side's activations in memory.

    Returns:
        Float32 losses at +u, -u and, with `center`, at the present codes; two or three forward
        passes. Where directions are of examples, a loss of each along a second axis.

    Raises:
        ValueError: `value_fn` does not return a real scalar.

    Examples:
        >>> from zoqo_jax import Quantizer, directions
        >>> w = Quantizer(range=1.275)(jnp.zeros(3))  # s = .01
        >>> probe = directions.describe(jax.random.key(0), w, 1.0, distribution="rademacher")
        >>> losses(lambda w: jnp.abs(w).sum(), w, [probe], center=True).round(3).tolist()
        [0.03, 0.03, 0.0]
    """
    population = together * (2 if sides == "together" else 1)

    examples = max((direction.examples for direction in directions), default=0)

    def loss(tree: PyTree) -> Array:
        value = quaxify(value_fn)(tree)
        return of_examples(value, examples) if examples else scalar(value)

    def displaced_loss(side: Array) -> Array:
        return loss(_displaced(params, directions, side, _one_of(population)))

    over = jax.vmap if sides == "together" else lambda fn: functools.partial(jax.lax.map, fn)
    pair = over(displaced_loss)(jnp.array([1, -1], jnp.int8))
    return jnp.concatenate([pair, loss(params)[None]]) if center else pair


def verdicts(
    compare_fn: Comparator,
    params: PyTree,
    directions: Sequence[Direction],
    *,
    keys: Key[Array, " comparisons"] | None = None,
    together: int = 1,
) -> Float32[Array, ""]:
    """Compare the two sides of a query, by a function that may tell no more than which is better.

    Args:
        compare_fn: `compare_fn(a, b) -> scalar`, made of JAX operations; sees two trees of floats,
            the sides +u and -u. Only the sign counts, as for a sort that puts the better first: -1
            where `a` is better, 1 where `b` is, 0 for a draw.
        params: tree with quantized leaves; frozen and other leaves are not displaced.
        directions: one for each trained leaf, in the order of the tree.
        keys: compare once for each of them, by `compare_fn(a, b, key)`; what does not depend on the
            key is computed once.
        together: how many directions `jax.vmap` compares at once, this one among them.

    Returns:
        The sum of the signs; NaN if any is.

    Raises:
        ValueError: `compare_fn` does not return a real scalar, or returns a bool.

    Examples:
        >>> from zoqo_jax import Quantizer, directions
        >>> w = Quantizer(range=1.275)(jnp.zeros(()))
        >>> probe = directions.describe(jax.random.key(0), w, 1.0, distribution="rademacher")
        >>> up = lambda a, b: jnp.sign(a - b)  # the smaller first
        >>> verdicts(up, w, [probe]).item() == probe.draw(w).item()
        True
    """
    a, b = (_displaced(params, directions, jnp.int8(side), _one_of(together)) for side in (1, -1))

    def verdict(*key: Array) -> Array:
        said = quaxify(lambda a, b: compare_fn(a, b, *key))(a, b)
        if isinstance(said, bool) or getattr(said, "dtype", None) == jnp.bool_:
            raise ValueError("compare_fn must return -1, 0 or 1, got a bool.")
        return jnp.sign(scalar(said, "compare_fn"))

    return verdict() if keys is None else jax.vmap(verdict)(keys).sum()


def endpoints(
    params: PyTree, directions: Sequence[Direction], side: int | Integer[Array, ""]
) -> PyTree:
    """The quantized tree at `n + side * u`: where a query looked.

    Args:
        params: tree with quantized leaves.
        directions: one for each trained leaf, in the order of the tree.
        side: 1 or -1; 0 for no displacement.

    Examples:
        >>> from zoqo_jax import Quantizer, directions
        >>> w = Quantizer(range=1.0)(jnp.zeros(3))
        >>> probe = directions.describe(jax.random.key(0), w, 5.0, distribution="rademacher")
        >>> plus, minus = endpoints(w, [probe], 1), endpoints(w, [probe], -1)
        >>> (plus.codes.astype(int) - minus.codes.astype(int)).tolist()
        [10, 10, 10]
    """
    side = jnp.asarray(side, jnp.int8)
    return _displaced(params, directions, side, lambda perturbed: perturbed.endpoint())


def _one_of(population: int) -> Callable[[PerturbedArray], PerturbedArray]:
    """What tells an array how many displacements are evaluated with its own."""
    return lambda perturbed: dataclasses.replace(perturbed, population=population)


def _displaced(
    params: PyTree,
    directions: Sequence[Direction],
    side: Array,
    how: Callable[[PerturbedArray], Any],
) -> PyTree:
    remaining = iter(directions)
    return jax.tree.map(
        lambda leaf: (
            how(PerturbedArray(leaf, next(remaining).flipped(side))) if is_trained(leaf) else leaf
        ),
        params,
        is_leaf=is_quantized,
    )


def scalar(value: Any, source: str = "value_fn") -> Float32[Array, ""]:
    """What an objective, or another function that is called `source`, returned, as float32.

    A loss of 16 bits is warned of: two losses that differ by less than a 256th (bfloat16) of
    themselves are mostly the same number.

    Raises:
        ValueError: it is no real scalar.

    Examples:
        >>> scalar(jnp.float32(1.5))
        Array(1.5, dtype=float32)
        >>> scalar(jnp.ones(2))
        Traceback (most recent call last):
        ValueError: value_fn must return a real scalar, got shape (2,) and dtype float32.
    """
    if isinstance(value, quax.ArrayValue):  # an objective that ends without an operation of its own
        value = value.materialise()
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(value, float | int):
        shape, dtype = (), jnp.float32
    real = dtype is not None and not jnp.issubdtype(dtype, jnp.complexfloating)
    if shape != () or not real:
        got = (
            f"shape {shape} and dtype {dtype}" if dtype is not None else f"a {type(value).__name__}"
        )
        raise ValueError(f"{source} must return a real scalar, got {got}.")
    if source == "value_fn":
        _warn_of_16_bits(dtype)
    return jnp.asarray(value, jnp.float32)


def _warn_of_16_bits(dtype: Any) -> None:
    """Warn of losses whose differences are rounded away before they are known."""
    if jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4:
        warnings.warn(
            f"value_fn returned a loss in {jnp.dtype(dtype)}, which rounds away the difference of "
            "two losses: compute the loss from logits in float32 (logits.astype(jnp.float32)).",
            UserWarning,
            stacklevel=2,
        )


def of_examples(value: Any, examples: int) -> Float32[Array, " examples"]:
    """What an objective returned, as float32, where it is to return a loss for each example.

    Raises:
        ValueError: it did not.
    """
    shape = getattr(value, "shape", None)
    if shape != (examples,):
        got = f"a {type(value).__name__}" if shape is None else f"shape {shape}"
        raise ValueError(f"value_fn must return a loss for each of {examples} examples, got {got}.")
    _warn_of_16_bits(value.dtype)
    return jnp.asarray(value, jnp.float32)


def differences(pairs: Float32[Array, "queries 2"]) -> Float32[Array, " queries"]:
    """l+ - l- of a step's queries, and 0 where either loss is NaN or inf.

    They are rounded to whole multiples of one power of two, to 16 significant bits of the largest
    (fewer beyond 256 queries), and cut off at 2^112. Sums of them, or of their products with signs,
    are then exact in float32 in any order, so a step has the same bits however a compiler arranges
    it, and a run can be replayed from its differences.

    Examples:
        >>> differences(jnp.array([[0.75, 0.5], [jnp.nan, 0.5]])).tolist()
        [0.25, 0.0]
    """
    raw = pairs[..., 0] - pairs[..., 1]
    return rounded(jnp.where(jnp.isfinite(raw), raw, 0.0))


def rounded(raw: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Numbers as `differences` rounds them, by the last axis.

    Examples:
        >>> rounded(jnp.array([1.0, 1e-3, 1e-9])).tolist()
        [1.0, 0.001007080078125, 0.0]
    """
    raw = jnp.clip(raw, -(2.0**112), 2.0**112)
    bits = min(16, 24 - (raw.shape[-1] - 1).bit_length())
    largest = jnp.abs(raw).max(axis=-1, keepdims=True)
    exponent = (jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23) - 126
    shift = jnp.clip(bits - exponent, -126, 126)
    return jnp.round(raw * power_of_two(shift)) * power_of_two(-shift)


def whole(
    heard: Float32[Array, " queries"],
) -> tuple[Int32[Array, " queries"], Float32[Array, ""]]:
    """Differences as multiples of a power of two, at most 2^17, and one over that power.

    Examples:
        >>> multiples, per_unit = whole(jnp.array([0.75, -0.5]))
        >>> (multiples / per_unit).tolist()
        [0.75, -0.5]
    """
    bits = min(16, 24 - (heard.shape[-1] - 1).bit_length())
    exponent = (jax.lax.bitcast_convert_type(jnp.abs(heard).max(), jnp.int32) >> 23) - 126
    per_unit = power_of_two(jnp.clip(bits + 1 - exponent, -126, 126))
    return jnp.round(heard * per_unit).astype(jnp.int32), per_unit


def power_of_two(exponent: Int32[Array, "..."]) -> Float32[Array, "..."]:
    """Powers of two, exactly, for exponents from -126 to 127.

    Examples:
        >>> power_of_two(jnp.array([3, -1])).tolist()
        [8.0, 0.5]
    """
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)

"""SPSA: float gradients from two forward passes, for any optax chain.

James C. Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient
approximation", IEEE Transactions on Automatic Control 37(3), 1992. With noise="gaussian" and SGD
behind it this is MeZO (Malladi et al., 2023, arXiv:2305.17333).
"""

from __future__ import annotations

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from zoqo_jax import directions
from zoqo_jax.grids.arrays import is_float_array, is_quantized, no_update
from zoqo_jax.implicit.rules import quaxify
from zoqo_jax.transforms import queries, stepping
from zoqo_jax.transforms.floats import Directions, Noise, both_sides
from zoqo_jax.transforms.schedules import ONE, Count, Schedule, check_positive, value_at
from zoqo_jax.transforms.state import State, initial_state, record, step_key

__all__ = ["spsa"]


def spsa(
    radius: Schedule,
    *,
    key: PRNGKeyArray,
    num_queries: Count = ONE,
    noise: Noise = "rademacher",
    query_batch: Count | None = ONE,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Estimate gradients of a tree of floats, g = (l(x + mu u) - l(x - mu u)) / (2 mu) u.

    The estimate is the mean over q queries; on a quadratic it is unbiased, elsewhere up to O(mu^2).
    Leaves that are no arrays of floats, quantized ones too, are left alone: their updates are zero,
    or None where there is nothing to add to. Estimates are made in
    float32 and have the dtype of their leaf; those beyond its range have its largest magnitude. In
    float16 and bfloat16, x + mu u is rounded: a query that displaces no entry says nothing, and is
    counted in `state.info.skipped`.

    Args:
        radius: mu, value units; a positive number or an optax schedule. It must be at least about
            half the distance between neighbouring numbers of a leaf's dtype (4e-3 in bfloat16 and
            5e-4 in float16 at values near 1), or it moves nothing there.
        key: all of the run's randomness.
        num_queries: query pairs a step, q.
        noise: distribution of an entry of u: "rademacher" or standard "gaussian".
        query_batch: query pairs evaluated at once, None for all.
        axis_name: inside `shard_map` or `pmap`, average the losses over this axis.

    Returns:
        A transformation whose updates are gradients, to be followed by any other. Its state is a
        `State`.

    Raises:
        ValueError: an argument outside what is said above, naming it and its value; in `tx.init`,
            a radius that displaces no entry of a leaf, where the parameters are known.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, zoqo_jax as zq
        >>> tx = optax.chain(zq.spsa(1e-3, key=jax.random.key(0)), optax.adam(0.1))
        >>> params = jnp.ones(3)
        >>> state = tx.init(params)
        >>> loss = lambda x: jnp.sum(x**2)
        >>> for _ in range(100):
        ...     updates, state = tx.update(None, state, params, value_fn=loss)
        ...     params = optax.apply_updates(params, updates)
        >>> loss(params).item() < 0.1
        True
    """
    check_positive("radius", radius)
    directions.check_choice("noise", noise, get_args(Noise))
    num_queries, query_batch = stepping.check_query_count(num_queries, query_batch)
    mean_over_2 = float(np.float32(0.5 / num_queries))

    def init(params: PyTree) -> State:
        _check_reach(radius, params)
        return initial_state(key, num_queries)

    def update(
        updates: Any,
        state: Any,
        params: PyTree | None = None,
        *,
        value_fn: queries.Objective | None = None,
        compare_fn: queries.Comparator | None = None,
        **extra: Any,
    ) -> tuple[PyTree, State]:
        del updates, extra
        if compare_fn is not None:
            raise ValueError("compare_fn serves zoqo alone: spsa needs losses, by value_fn.")
        if params is None or value_fn is None:
            missing = "params" if params is None else "value_fn"
            raise ValueError(
                f"{missing} must be given: tx.update(None, state, params, value_fn=f)."
            )
        own_key = step_key(state)
        noise_of = Directions(own_key, num_queries, noise)
        mu = value_at(radius, state.count)
        leaves, treedef = jax.tree.flatten(params, is_leaf=is_quantized)

        def displaced(query: Array | int, index: int, side: Array) -> Array:
            leaf = leaves[index]
            return leaf + (side * mu).astype(leaf.dtype) * noise_of.draw(query, index, leaf)

        def query_losses(query: Array | int) -> tuple[Array, Array]:
            def loss(side: Array) -> Array:
                moved = [
                    displaced(query, index, side) if is_float_array(leaf) else leaf
                    for index, leaf in enumerate(leaves)
                ]
                return queries.scalar(quaxify(value_fn)(treedef.unflatten(moved)))

            return both_sides(loss), is_stuck(query)

        def is_stuck(query: Array | int) -> Array:
            """Whether both ends are where the parameters are. Of float32 leaves `init` says it."""
            trained = [index for index, leaf in enumerate(leaves) if is_float_array(leaf)]
            if any(leaves[index].dtype.itemsize > 2 for index in trained):
                return jnp.bool(False)
            stays = [
                (displaced(query, index, jnp.float32(side)) == leaves[index]).all()
                for index in trained
                for side in (1.0, -1.0)
            ]
            return jnp.stack(stays).all() if stays else jnp.bool(False)

        pairs, stuck = stepping.over_queries(query_losses, num_queries, query_batch)
        if axis_name is not None:
            pairs = jax.lax.pmean(pairs, axis_name)
        state = record(state, pairs, stuck)

        def gradient(index: int) -> Array:
            total = noise_of.total(state.info.loss_differences, index, leaves[index])
            dtype = leaves[index].dtype
            largest = min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max))
            return jnp.clip(total * (mean_over_2 / mu), -largest, largest).astype(dtype)

        gradients = [
            gradient(index) if is_float_array(leaf) else no_update(leaf)
            for index, leaf in enumerate(leaves)
        ]
        return treedef.unflatten(gradients), state

    return optax.GradientTransformationExtraArgs(init, update)


def _check_reach(radius: Schedule, params: PyTree) -> None:
    """Refuse a radius that displaces no entry of a leaf, where both are known."""
    if callable(radius):
        return
    for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)[0]:
        if not is_float_array(leaf) or isinstance(leaf, jax.core.Tracer) or not jnp.size(leaf):
            continue
        x = np.asarray(leaf)
        mu = np.asarray(radius, x.dtype)
        if ((x + mu == x) & (x - mu == x)).all():
            apart = np.abs(x.astype(np.float64)).min() * float(jnp.finfo(x.dtype).eps)
            name = jax.tree_util.keystr(path) or "params"
            raise ValueError(
                f"radius must displace some entry of {name}, whose "
                f"{x.dtype.name} values are {apart:.1e} or more apart, got {radius}."
            )

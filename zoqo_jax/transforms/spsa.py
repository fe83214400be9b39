"""SPSA: float gradients from two forward passes, for any optax chain.

James C. Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient
approximation", IEEE Transactions on Automatic Control 37(3), 1992. With noise="gaussian" and SGD
behind it this is MeZO (Malladi et al., 2023, arXiv:2305.17333).
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from zoqo_jax import directions
from zoqo_jax.grids.arrays import is_float_array, is_quantized, no_update
from zoqo_jax.implicit.rules import quaxify
from zoqo_jax.transforms import auto, floats, queries, stepping
from zoqo_jax.transforms.applying import apply_updates
from zoqo_jax.transforms.auto import Auto
from zoqo_jax.transforms.floats import Directions, Noise, both_sides
from zoqo_jax.transforms.schedules import ONE, Count, Schedule, value_at
from zoqo_jax.transforms.spreading import AxisNames, Spread, over_queries, spread_over
from zoqo_jax.transforms.state import State, initial_state, query_keys, record, step_key

__all__ = ["spsa"]


def spsa(
    radius: Schedule | Auto = "auto",
    *,
    key: PRNGKeyArray,
    learning_rate: Literal["auto"] | None = None,
    num_queries: Count = ONE,
    noise: Noise = "rademacher",
    query_batch: Count | None = ONE,
    axis_names: AxisNames | None = None,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Train a tree of floats, or estimate its gradients for another transformation to use.

    Without arguments but the key, steps size themselves (see `zoqo_jax.transforms.sizing`): updates
    are steps, ready for `optax.apply_updates`, and nothing else is to be chosen. With a radius,
    updates are gradients, g = (l(x + mu u) - l(x - mu u)) / (2 mu) u.

    The estimate is the mean over q queries; on a quadratic it is unbiased, elsewhere up to O(mu^2).
    Leaves that are no arrays of floats, quantized ones too, are left alone: their updates are zero,
    or None where there is nothing to add to. Estimates are made in
    float32 and have the dtype of their leaf; those beyond its range have its largest magnitude. In
    float16 and bfloat16, x + mu u is rounded: a query that displaces no entry says nothing, and is
    counted in `state.info.skipped`.

    Args:
        radius: mu, value units; a positive number or an optax schedule, or "auto" for the steps
            that size themselves; then mu is a share of what each leaf's root mean square was at the
            start. A number must be at least about half the distance between neighbouring numbers of
            a leaf's dtype (4e-3 in bfloat16 and 5e-4 in float16 at values near 1), or it moves
            nothing there.
        key: all of the run's randomness.
        learning_rate: None; or "auto" to say that the radius is to be.
        num_queries: query pairs a step, q.
        noise: distribution of an entry of u: "rademacher" or standard "gaussian".
        query_batch: query pairs evaluated at once, None for all.
        axis_names: inside `shard_map` or `pmap`, a pair: the name of the axis over which losses are
            averaged, and of that over which queries are divided; None for either. See
            `zoqo_jax.distributed`, which does it for you.
        axis_name: the old name of the first of these.

    Returns:
        A transformation whose updates are steps, or with a radius gradients, to be followed by any
        other. Its state is a `State`.

    Raises:
        ValueError: an argument outside what is said above, naming it and its value; in `tx.init`,
            a radius that displaces no entry of a leaf, where the parameters are known.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, zoqo_jax as zq
        >>> tx = zq.spsa(key=jax.random.key(0))
        >>> loss = lambda x: jnp.sum((x - 2.0) ** 2)
        >>> params = jnp.ones(3)
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = tx.update(None, state, params, value_fn=loss)
        ...     return optax.apply_updates(params, updates), state
        >>> state = tx.init(params)
        >>> for _ in range(100):
        ...     params, state = step(params, state)
        >>> loss(params).item() < 0.1
        True

        Gradients, for Adam:

        >>> tx = optax.chain(zq.spsa(1e-3, key=jax.random.key(0)), optax.adam(0.1))
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = tx.update(None, state, params, value_fn=loss)
        ...     return optax.apply_updates(params, updates), state
        >>> params = jnp.ones(3)
        >>> state = tx.init(params)
        >>> for _ in range(100):
        ...     params, state = step(params, state)
        >>> loss(params).item() < 0.1
        True
    """
    if learning_rate not in (None, "auto"):
        raise ValueError(f"learning_rate must be None or 'auto', got {learning_rate!r}.")
    if learning_rate == "auto" and not isinstance(radius, str):
        raise ValueError(f"radius must be 'auto' where learning_rate is, got {radius!r}.")
    sized = auto.of_floats(radius=radius)
    directions.check_choice("noise", noise, get_args(Noise))
    num_queries, query_batch = stepping.check_query_count(num_queries, query_batch)
    own_spread = spread_over(axis_names, axis_name)
    mean_over_2 = float(np.float32(0.5 / num_queries))

    def init(params: PyTree) -> State:
        state = initial_state(key, num_queries)
        if sized is not None:
            return sized.begin(state, _floats(params))
        _check_reach(radius, params)
        return state

    def update(
        updates: Any,
        state: Any,
        params: PyTree | None = None,
        *,
        value_fn: queries.Objective | None = None,
        compare_fn: queries.Comparator | None = None,
        spread: Spread | None = None,
        **extra: Any,
    ) -> tuple[PyTree, State]:
        del updates, extra
        spread = own_spread if spread is None else spread
        if compare_fn is not None:
            raise ValueError("compare_fn serves zoqo alone: spsa needs losses, by value_fn.")
        if params is None or value_fn is None:
            missing = "params" if params is None else "value_fn"
            raise ValueError(
                f"{missing} must be given: tx.update(None, state, params, value_fn=f)."
            )
        noise_of = Directions(query_keys(state), num_queries, noise)
        leaves, treedef = jax.tree.flatten(params, is_leaf=is_quantized)
        if sized is None:
            mu = value_at(radius, state.count)
        else:
            trained = [index for index, leaf in enumerate(leaves) if is_float_array(leaf)]
            typical = dict(zip(trained, state.sizes.scales, strict=True))

        def reach(query: Array | int, index: int) -> Array:
            return mu if sized is None else state.sizes.probed[query] * typical[index]

        def displaced(query: Array | int, index: int, side: Array) -> Array:
            leaf, far = leaves[index], side * reach(query, index)
            return leaf + far.astype(leaf.dtype) * noise_of.draw(query, index, leaf)

        def query_losses(objective: queries.Objective, query: Array | int) -> Array:
            def loss(side: Array) -> Array:
                moved = [
                    displaced(query, index, side) if is_float_array(leaf) else leaf
                    for index, leaf in enumerate(leaves)
                ]
                return queries.scalar(quaxify(objective)(treedef.unflatten(moved)))

            return both_sides(loss)

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

        pairs = spread.losses(query_losses, value_fn, num_queries, query_batch)
        stuck = over_queries(is_stuck, num_queries, query_batch)
        after = record(state, pairs, stuck)
        if sized is not None:
            loss = functools.partial(spread.loss_if, value_fn)
            after, pending = sized.ask(step_key(state), state, after, loss, params)

        def update_of(index: int) -> Array:
            leaf = leaves[index]
            if sized is None:
                total = noise_of.total(after.info.loss_differences, index, leaf)
                total = total * (mean_over_2 / mu)
            else:
                times, sizes = after.info.record.T
                total = noise_of.total(times * jnp.abs(sizes), index, leaf) * -typical[index]
            largest = min(float(jnp.finfo(leaf.dtype).max), float(jnp.finfo(jnp.float32).max))
            return jnp.clip(total, -largest, largest).astype(leaf.dtype)

        changes = [
            update_of(index) if is_float_array(leaf) else no_update(leaf)
            for index, leaf in enumerate(leaves)
        ]
        after = floats.count_moved(after, [x for x in changes if is_float_array(x)])
        made = treedef.unflatten(changes)
        if sized is not None:
            moved = apply_updates(params, made)
            after = sized.close(state, after, _floats(params), pending, loss, moved)
        return made, after

    return optax.GradientTransformationExtraArgs(init, update)


def _floats(params: PyTree) -> list[Array]:
    """The leaves that are trained.

    Raises:
        ValueError: there are none.
    """
    leaves = [x for x in jax.tree.leaves(params, is_leaf=is_quantized) if is_float_array(x)]
    if not leaves:
        raise ValueError("params must have an array of floats: there is nothing to train.")
    return leaves


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

"""QZO: the codes of a quantized model stay as they are, and its scales are trained.

Sifeng Shang, Jiayi Zhou, Chenyu Lin, Minxian Li and Kaiyang Zhou, "Fine-tuning Quantized Neural
Networks with Zeroth-order Optimization", 2025, arXiv:2505.13430. Scales are real numbers, so they
can be probed as floats are; the derivative along a direction is clipped, for one bad query could
otherwise throw every scale far off.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, PRNGKeyArray, PyTree, UInt32

from zoqo_jax import directions
from zoqo_jax.grids.arrays import is_quantized, is_trained, no_update, trained_leaves
from zoqo_jax.implicit.rules import quaxify
from zoqo_jax.transforms import floats, queries, stepping
from zoqo_jax.transforms.floats import Directions, Noise, both_sides
from zoqo_jax.transforms.schedules import ONE, Count, Schedule, check_positive, inverse_at, value_at
from zoqo_jax.transforms.state import State, initial_state, record, replayed, step_key
from zoqo_jax.xla import compiler, random_bits

__all__ = ["qzo"]


def qzo(
    learning_rate: Schedule,
    radius: Schedule,
    *,
    key: PRNGKeyArray,
    clip: float | Array | None = 100.0,
    num_queries: Count = ONE,
    noise: Noise = "gaussian",
    query_batch: Count | None = ONE,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Descent on the scales of quantized arrays, two forward passes for each query.

    With D all the scales, one step is

    .. math::
        z &\sim N(0, I), \quad D_\pm = D \pm \mu z \\
        d &= \mathrm{clip}\Big(\frac{\ell_+ - \ell_-}{2 \mu}, -C, C\Big), \quad D \leftarrow
        D - \eta d z

    and with q queries d z is their mean. Scales are probed in float32, whatever they are stored in.
    Those in float16 or bfloat16 are rounded up or down at random, so that steps far below their
    precision are taken on average. A step that would change a scale's sign ends at zero. Offsets
    stay.

    Args:
        learning_rate: eta, scale units; a positive number or an optax schedule.
        radius: mu, scale units (values for each unit of a level); a positive number or an optax
            schedule.
        key: all of the run's randomness.
        clip: C, the largest derivative along a direction that is believed, or None for any.
        num_queries: query pairs a step, q.
        noise: distribution of an entry of z: standard "gaussian" or "rademacher".
        query_batch: query pairs evaluated at once, None for all.
        axis_name: inside `shard_map` or `pmap`, average the losses over this axis.

    Returns:
        A transformation; call `tx.update(None, state, params, value_fn=f)` and
        `optax.apply_updates`. Its state is a `State`.

    Raises:
        ValueError: an argument outside what is said above, naming it and its value.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, zoqo_jax as zq
        >>> params = zq.quantize({"w": jnp.eye(4)}, zq.Quantizer(bits=4, axis=0))
        >>> tx = zq.qzo(learning_rate=1e-3, radius=1e-3, key=jax.random.key(0), num_queries=2)
        >>> loss = lambda params: jnp.sum((params["w"] - 2 * jnp.eye(4)) ** 2)
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = tx.update(None, state, params, value_fn=loss)
        ...     return optax.apply_updates(params, updates), state
        >>> state = tx.init(params)
        >>> trained = params
        >>> for _ in range(100):
        ...     trained, state = step(trained, state)
        >>> loss(zq.dequantize(trained)).item() < 0.1  # from 4
        True
        >>> bool((trained["w"].codes == params["w"].codes).all())
        True
    """
    check_positive("learning_rate", learning_rate)
    check_positive("radius", radius)
    if clip is not None:
        check_positive("clip", clip)
    directions.check_choice("noise", noise, get_args(Noise))
    num_queries, query_batch = stepping.check_query_count(num_queries, query_batch)
    mean = float(np.float32(1 / num_queries))

    def init(params: PyTree) -> State:
        trained_leaves(params)
        return initial_state(key, num_queries)

    def update(
        updates: Any,
        state: Any,
        params: PyTree | None = None,
        *,
        value_fn: queries.Objective | None = None,
        differences: Float[Array, " queries"] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, State]:
        del updates, extra
        trained_leaves(params)
        leaves, treedef = jax.tree.flatten(params, is_leaf=is_quantized)
        own_key = step_key(state)
        noise_of = Directions(own_key, num_queries, noise)
        mu, eta = value_at(radius, state.count), value_at(learning_rate, state.count)
        scales = [leaf.scale.astype(jnp.float32) if is_trained(leaf) else None for leaf in leaves]

        def query_losses(objective: queries.Objective, query: Array | int) -> Array:
            def loss(side: Array) -> Array:
                moved = [
                    leaf
                    if scale is None
                    else dataclasses.replace(
                        leaf, scale=scale + side * mu * noise_of.draw(query, i, scale)
                    )
                    for i, (leaf, scale) in enumerate(zip(leaves, scales, strict=True))
                ]
                return queries.scalar(quaxify(objective)(treedef.unflatten(moved)))

            return both_sides(loss)

        if differences is not None:
            after = replayed(state, differences)
        elif value_fn is not None:
            losses = functools.partial(query_losses, value_fn)
            pairs = stepping.over_queries(losses, num_queries, query_batch)
            pairs = pairs if axis_name is None else jax.lax.pmean(pairs, axis_name)
            after = record(state, pairs)
        else:
            raise ValueError("value_fn must be given: tx.update(None, state, params, value_fn=f).")

        derivatives = after.info.loss_differences * (
            np.float32(0.5) * inverse_at(radius, state.count)
        )
        if clip is not None:
            derivatives = jnp.clip(derivatives, -clip, clip)
        move_key = jax.random.fold_in(own_key, num_queries)

        def change(i: int) -> Any:
            zeros = no_update(leaves[i])
            scale = scales[i]
            if scale is None:
                return zeros
            moved = scale - compiler.unfused(eta * mean * noise_of.total(derivatives, i, scale))
            moved = jnp.where(moved * jnp.sign(scale) < 0.0, 0.0, moved)
            rows = random_bits.rows(jax.random.fold_in(move_key, i), scale.shape[:-1])
            words = random_bits.words(rows, scale.shape[-1] if scale.ndim else 1, 0).reshape(
                scale.shape
            )
            moved = _rounded_at_random(words, moved, leaves[i].scale.dtype)
            delta = (moved.astype(jnp.float32) - scale).astype(moved.dtype)
            return dataclasses.replace(zeros, scale=delta)

        changes = [change(i) for i in range(len(leaves))]
        after = floats.count_moved(after, [x.scale for x in changes if is_trained(x)])
        return treedef.unflatten(changes), after

    return optax.GradientTransformationExtraArgs(init, update)


def _rounded_at_random(
    words: UInt32[Array, "..."], x: Float32[Array, "..."], dtype: Any
) -> Float[Array, "..."]:
    """One of the two neighbours of x among the numbers of a dtype, unbiased."""
    if dtype == jnp.float32:
        return x
    largest = float(jnp.finfo(dtype).max)
    x = jnp.clip(x, -largest, largest)
    near = x.astype(dtype)
    rest = x - near.astype(jnp.float32)
    beyond = jnp.nextafter(near, jnp.where(rest > 0, largest, -largest).astype(dtype))
    gap = jnp.abs(beyond.astype(jnp.float32) - near.astype(jnp.float32))
    chance = (jnp.abs(rest) / jnp.where(gap > 0, gap, 1.0) * 2.0**32).astype(jnp.uint32)
    return jnp.where(words < chance, beyond, near)

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
from zoqo_jax.grids.scales import float_part, map_float
from zoqo_jax.implicit.rules import quaxify
from zoqo_jax.transforms import auto, floats, queries, stepping
from zoqo_jax.transforms.applying import apply_updates
from zoqo_jax.transforms.auto import Auto
from zoqo_jax.transforms.floats import Directions, Noise, both_sides
from zoqo_jax.transforms.schedules import ONE, Count, Schedule, check_positive, inverse_at, value_at
from zoqo_jax.transforms.spreading import AxisNames, Spread, spread_over
from zoqo_jax.transforms.state import (
    State,
    as_logged,
    initial_state,
    query_keys,
    record,
    replayed,
    step_key,
)
from zoqo_jax.xla import compiler, random_bits

__all__ = ["qzo"]


def qzo(
    learning_rate: Schedule | Auto = "auto",
    radius: Schedule | Auto = "auto",
    *,
    key: PRNGKeyArray,
    clip: float | Array | None = 100.0,
    num_queries: Count = ONE,
    noise: Noise = "gaussian",
    query_batch: Count | None = ONE,
    axis_names: AxisNames | None = None,
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
        learning_rate: eta, scale units; a positive number or an optax schedule; or "auto", with
            the radius, for steps that size themselves (see `zoqo_jax.transforms.sizing`).
        radius: mu, scale units (values for each unit of a level); a positive number or an optax
            schedule; or "auto", a share of what the root mean square of a leaf's scales was at the
            start.
        key: all of the run's randomness.
        clip: C, the largest derivative along a direction that is believed, or None for any; steps
            that size themselves go along none more than three times.
        num_queries: query pairs a step, q.
        noise: distribution of an entry of z: standard "gaussian" or "rademacher".
        query_batch: query pairs evaluated at once, None for all.
        axis_names: inside `shard_map` or `pmap`, a pair: the name of the axis over which losses are
            averaged, and of that over which queries are divided; None for either. See
            `zoqo_jax.distributed`, which does it for you.
        axis_name: the old name of the first of these.

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
    if isinstance(learning_rate, str) != isinstance(radius, str):
        raise ValueError(
            "learning_rate and radius must both be numbers or both be 'auto', got "
            f"{learning_rate!r} and {radius!r}."
        )
    sized = auto.of_floats(radius=radius, learning_rate=learning_rate)
    if clip is not None:
        check_positive("clip", clip)
    directions.check_choice("noise", noise, get_args(Noise))
    num_queries, query_batch = stepping.check_query_count(num_queries, query_batch)
    own_spread = spread_over(axis_names, axis_name)
    mean = float(np.float32(1 / num_queries))

    def init(params: PyTree) -> State:
        scales = [float_part(leaf.scale) for leaf in trained_leaves(params).values()]
        state = initial_state(key, num_queries)
        return state if sized is None else sized.begin(state, scales)

    def update(
        updates: Any,
        state: Any,
        params: PyTree | None = None,
        *,
        value_fn: queries.Objective | None = None,
        differences: Float[Array, "queries ..."] | None = None,
        spread: Spread | None = None,
        **extra: Any,
    ) -> tuple[PyTree, State]:
        del updates, extra
        spread = own_spread if spread is None else spread
        trained_leaves(params)
        leaves, treedef = jax.tree.flatten(params, is_leaf=is_quantized)
        own_key = step_key(state)
        noise_of = Directions(query_keys(state), num_queries, noise)
        scales = [
            float_part(leaf.scale).astype(jnp.float32) if is_trained(leaf) else None
            for leaf in leaves
        ]

        if sized is None:
            mu, eta = value_at(radius, state.count), value_at(learning_rate, state.count)
        else:
            trained = [i for i, scale in enumerate(scales) if scale is not None]
            typical = dict(zip(trained, state.sizes.scales, strict=True))

        def reach(query: Array | int, i: int) -> Array:
            return mu if sized is None else state.sizes.probed[query] * typical[i]

        def query_losses(objective: queries.Objective, query: Array | int) -> Array:
            def loss(side: Array) -> Array:
                moved = [
                    leaf
                    if scale is None
                    else _with_floats(
                        leaf, scale + side * reach(query, i) * noise_of.draw(query, i, scale)
                    )
                    for i, (leaf, scale) in enumerate(zip(leaves, scales, strict=True))
                ]
                return queries.scalar(quaxify(objective)(treedef.unflatten(moved)))

            return both_sides(loss)

        if differences is not None:
            after = replayed(state, differences)
        elif value_fn is not None:
            pairs = spread.losses(query_losses, value_fn, num_queries, query_batch)
            after = record(state, pairs)
            if sized is not None:
                loss = functools.partial(spread.loss_if, value_fn)
                after, pending = sized.ask(own_key, state, after, loss, params)
        else:
            raise ValueError("value_fn must be given: tx.update(None, state, params, value_fn=f).")

        if sized is None:
            derivatives = after.info.loss_differences * (
                np.float32(0.5) * inverse_at(radius, state.count)
            )
            if clip is not None:
                derivatives = jnp.clip(derivatives, -clip, clip)
        else:  # what a replayed step looked along is known from its record
            noise_of = noise_of._replace(key=query_keys(as_logged(state, after.info.log)))
            times, sizes = after.info.record.T
            derivatives = times * jnp.abs(sizes)
        move_key = jax.random.fold_in(own_key, num_queries)

        def change(i: int) -> Any:
            zeros = no_update(leaves[i])
            scale = scales[i]
            if scale is None:
                return zeros
            rate = eta * mean if sized is None else typical[i]
            moved = scale - compiler.unfused(rate * noise_of.total(derivatives, i, scale))
            moved = jnp.where(moved * jnp.sign(scale) < 0.0, 0.0, moved)
            rows = random_bits.rows(jax.random.fold_in(move_key, i), scale.shape[:-1])
            words = random_bits.words(rows, scale.shape[-1] if scale.ndim else 1, 0).reshape(
                scale.shape
            )
            moved = _rounded_at_random(words, moved, float_part(leaves[i].scale).dtype)
            return _with_floats(zeros, (moved.astype(jnp.float32) - scale).astype(moved.dtype))

        changes = [change(i) for i in range(len(leaves))]
        after = floats.count_moved(after, [float_part(x.scale) for x in changes if is_trained(x)])
        made = treedef.unflatten(changes)
        if sized is not None and differences is None:
            moved = apply_updates(params, made)
            arrays = [scale for scale in scales if scale is not None]
            after = sized.close(state, after, arrays, pending, loss, moved)
        return made, after

    return optax.GradientTransformationExtraArgs(init, update)


def _with_floats(leaf: Any, moved: Array) -> Any:
    """A quantized leaf with other scales, or another outer level of them."""
    return dataclasses.replace(leaf, scale=map_float(lambda _: moved, leaf.scale))


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

"""qzo is its formula, in any dtype of the scales, and leaves the codes alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_reference as runs
from choosing import by_turns
from compiling import NORMALLY
from statistical import mean_and_error

import zoqo_jax as zq
from zoqo_jax.transforms.floats import Directions

KEY = jax.random.key(31)


def blocks(scale_dtype=jnp.float32, seed=0):
    """Codes in blocks of 4, with an offset."""
    values = jnp.asarray(np.random.default_rng(seed).normal(size=(3, 8)), jnp.float32)
    return zq.Quantizer(4, range="minmax", block=4, scale_dtype=scale_dtype)(values)


TARGET = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)


def distance(array):
    """Quadratic in the scales."""
    return jnp.mean((array - jnp.asarray(TARGET)) ** 2)


def values_at(array, scale):
    """The formula, in NumPy: scale * level + offset."""
    levels = np.asarray(array.grid.levels, np.float32)[np.asarray(array.codes)]
    spread = lambda x: np.repeat(np.asarray(x, np.float32), 4, axis=-1)  # noqa: E731
    return spread(scale) * levels + spread(array.offset)


@pytest.mark.parametrize(
    ("noise", "num_queries", "clip"),
    [("gaussian", 1, None), ("gaussian", 3, 2.0), ("rademacher", 2, 2.0)],
)
def test_qzo_is_its_formula(noise, num_queries, clip):
    eta, mu = lambda count: jnp.where(count < 10, 0.002, 0.001), 0.0625
    tx = zq.qzo(eta, mu, key=KEY, noise=noise, num_queries=num_queries, clip=clip)
    params = start = blocks()
    state = tx.init(params)
    # To the bit: Gaussian draws have others in a program that is compiled in a hurry.
    compiled = functools.partial(jax.jit, compiler_options=NORMALLY)
    update = compiled(lambda params, state: tx.update(None, state, params, value_fn=distance))
    draw = compiled(
        lambda key, query: Directions(key, num_queries, noise).draw(query, 0, start.scale)
    )
    clipped = 0
    for count in range(20):
        scale, total = np.asarray(params.scale), np.zeros(params.scale.shape, np.float32)
        updates, state = update(params, state)
        for query in range(num_queries):
            z = np.asarray(draw(jax.random.fold_in(KEY, count), query))
            ends = [values_at(params, scale + side * np.float32(mu) * z) for side in (1, -1)]
            losses = [np.mean((end - TARGET) ** 2) for end in ends]
            np.testing.assert_allclose(state.info.losses[query], losses, rtol=1e-5)
            d = np.asarray(state.info.loss_differences)[query] / np.float32(2 * mu)
            clipped += clip is not None and abs(d) > clip
            total += (d if clip is None else np.clip(d, -np.float32(clip), np.float32(clip))) * z
        moved = scale - np.float32(runs.at(eta, count)) * np.float32(1 / num_queries) * total
        assert (moved > 0).all()
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params.scale, scale + (moved - scale))
    assert clip is None or 0 < clipped < 20 * num_queries
    np.testing.assert_array_equal(params.packed, start.packed)
    np.testing.assert_array_equal(params.offset, start.offset)
    assert distance(params.materialise()) < distance(start.materialise())


@pytest.mark.parametrize(
    ("scale_dtype", "noise"),
    by_turns([jnp.float32, jnp.float16, jnp.bfloat16], ["gaussian", "rademacher"]),
)
def test_qzo_moves_against_the_gradient_on_average_in_any_dtype(scale_dtype, noise):
    """Within four standard errors, though each step is a small part of a 16-bit scale's spacing."""
    params, eta = blocks(scale_dtype), 2e-7
    tx = zq.qzo(eta, 0.01, key=KEY, noise=noise, clip=None)

    @jax.jit
    @jax.vmap
    def move(key):
        state = tx.init(params)._replace(key=key)
        return tx.update(None, state, params, value_fn=distance)[0].scale

    moves = move(jax.random.split(KEY, 40_000))
    assert moves.dtype == scale_dtype
    mean, error = mean_and_error(moves)
    levels = np.asarray(params.grid.levels)[np.asarray(params.codes)]
    slopes = 2 / TARGET.size * (np.asarray(params.materialise()) - TARGET) * levels
    expected = -eta * slopes.reshape(3, 2, 4).sum(axis=-1)
    assert (abs(mean - expected) < 4 * error).all() and (abs(mean) > 4 * error).any()
    if scale_dtype != jnp.float32:
        bits_less = jnp.finfo(jnp.float32).nmant - jnp.finfo(scale_dtype).nmant
        spacing = np.spacing(np.asarray(params.scale, np.float32)) * 2.0**bits_less
        assert set(np.unique(np.asarray(moves, np.float32) / spacing)) == {-1.0, 0.0, 1.0}
        assert (abs(expected) < 0.1 * spacing).all()


@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.float16])
def test_scales_of_qzo_keep_their_sign(scale_dtype):
    """Those of a file's blocks may be negative; none is carried through zero."""
    scale = jnp.asarray([[0.5], [-0.5], [0.0]], scale_dtype)
    grid = zq.Quantizer(4).grid
    codes = jnp.full((3, 4), grid.high)
    params = zq.QuantizedArray.from_codes(codes, scale, None, grid)
    tx = zq.qzo(1.0, 0.125, key=KEY, clip=None)
    loss = lambda w: 1e3 * (w[0, 0] - w[1, 0] + w[2, 0])  # noqa: E731
    signs = set()
    for seed in range(8):
        state = tx.init(params)._replace(key=jax.random.key(seed))
        updates, _ = tx.update(None, state, params, value_fn=loss)
        after = optax.apply_updates(params, updates).scale
        assert after.dtype == scale_dtype and (jnp.sign(after) * jnp.sign(scale) >= 0).all()
        signs |= {(i, s) for i, s in enumerate(jnp.sign(after)[:, 0].tolist())}
    assert signs == {(0, 0.0), (0, 1.0), (1, 0.0), (1, -1.0), (2, 1.0), (2, -1.0)}


def test_qzo_is_the_same_through_a_scan_over_layers_and_layer_by_layer():
    values = jnp.asarray(np.random.default_rng(2).normal(size=(3, 8, 8)), jnp.float32)
    params = zq.nf4(block=4)(values)
    x = jnp.ones((2, 8))

    def scanned(w):
        return jnp.sum(jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)[0] ** 2)

    def unrolled(w):
        h = x
        for i in range(3):
            h = jnp.tanh(h @ w[i])
        return jnp.sum(h**2)

    tx = zq.qzo(0.1, 0.01, key=KEY)
    losses = [
        tx.update(None, tx.init(params), params, value_fn=f)[1].info.losses
        for f in (scanned, unrolled)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.float16])
def test_replay_rebuilds_the_scales_bit_for_bit(scale_dtype):
    start = {"w": blocks(scale_dtype), "bias": jnp.ones(3)}
    tx = zq.qzo(lambda count: jnp.where(count < 99, 0.02, 0.01), 0.01, key=KEY, num_queries=3)
    loss = lambda params: distance(jnp.tanh(params["w"]) + params["bias"][:, None])  # noqa: E731

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, value_fn=loss)
        return (optax.apply_updates(params, updates), state), state.info.loss_differences

    train = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=200))
    (trained, _), log = train(start)
    assert (trained["w"].scale != start["w"].scale).all()
    rebuilt = zq.replay(start, log, tx)
    jax.tree.map(np.testing.assert_array_equal, rebuilt, trained)

"""What optax does around codes: frozen ones stay, changes of codes compose or are refused.

Every transformation of optax that somebody would chain is in one of the tables below. adamw behind
spsa moved 509 of 512 frozen codes by the truncation of floats to bytes, and their scales.

Reported of kindred projects: google-deepmind/optax 290 and 296 (freezing),
OPTML-Group/Unlearn-Saliency 32 (weight decay moves what is masked).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoqo_jax as zq

KEY = jax.random.key(7)

# Arithmetic that makes floats of bytes: refused behind changes of codes, harmless to frozen ones.
ARITHMETIC = {
    "scale": lambda: optax.scale(-1.0),
    "scale_by_learning_rate": lambda: optax.scale_by_learning_rate(0.1),
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, 0.9),
    "nesterov": lambda: optax.sgd(0.1, 0.9, nesterov=True),
    "trace": lambda: optax.trace(0.9),
    "ema": lambda: optax.ema(0.9),
    "add_decayed_weights": lambda: optax.add_decayed_weights(0.1),
    "clip": lambda: optax.clip(0.5),
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(0.5),
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.1),
    "centralize": lambda: optax.centralize(),
    "normalize_by_update_norm": lambda: optax.normalize_by_update_norm(),
    "sign_sgd": lambda: optax.sign_sgd(0.1),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "adagrad": lambda: optax.adagrad(0.1),
    "adamax": lambda: optax.adamax(0.1),
    "amsgrad": lambda: optax.amsgrad(0.1),
    "lion": lambda: optax.lion(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1),
    "nadam": lambda: optax.nadam(0.1),
    "adabelief": lambda: optax.adabelief(0.1),
    "lamb": lambda: optax.lamb(0.1),
    "fromage": lambda: optax.fromage(0.1),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
    "MultiSteps": lambda: optax.MultiSteps(optax.identity(), 2).gradient_transformation(),
}
# JAX itself refuses them for integer leaves: behind frozen codes they need `on_floats`.
FLOATS_ONLY = {
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "add_noise": lambda: optax.add_noise(0.1, 0.5, key=0),
    "novograd": lambda: optax.novograd(0.1),
    "apply_if_finite(sgd)": lambda: optax.apply_if_finite(optax.sgd(0.1), 3),
}
# They leave bytes as they are.
NEUTRAL = {
    "identity": lambda: optax.identity(),
    "zero_nans": lambda: optax.zero_nans(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.identity(), 3),
    "on_floats(adamw)": lambda: zq.on_floats(optax.adamw(0.1)),
    "on_floats(chain)": lambda: zq.on_floats(
        optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.1), optax.sgd(0.1))
    ),
    "masked(adamw)": lambda: optax.masked(optax.adamw(0.1), {"w": False, "b": False}),
}
METHODS = {
    "zoqo": lambda: zq.zoqo(1.0, 1.0, key=KEY),
    "caq_zo": lambda: zq.caq_zo(1.0, key=KEY),
    "quzo": lambda: zq.quzo(1.0, key=KEY),
    "qes": lambda: zq.qes(1.0, key=KEY, window=2),
}


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Optax needs it, for bytes too."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def start(bits=8, frozen=False):
    w = jax.random.normal(jax.random.key(0), (8, 16))
    params = {"w": zq.Quantizer(bits)(w), "b": jnp.ones(3)}
    return zq.freeze(params) if frozen else params


def loss(params):
    return jnp.sum((params["w"] - 0.3) ** 2) + jnp.sum(params["b"] ** 2)


def run(tx, params, steps=2):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    once = jax.jit(lambda carry: step(carry, None)[0])
    carry = (params, tx.init(params))
    for _ in range(steps):
        carry = once(carry)
    return carry[0]


def trace(tx, params):
    """One step, not compiled."""
    look = lambda s, p: tx.update(None, s, p, value_fn=loss)  # noqa: E731
    jax.eval_shape(look, jax.eval_shape(tx.init, params), params)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


FOLLOWING_FAST = ("scale", "momentum", "clip", "adamw", "MultiSteps", "on_floats(chain)")


@pytest.mark.parametrize(
    "name",
    [
        name if name in FOLLOWING_FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in (*ARITHMETIC, *NEUTRAL)
    ],
)
def test_frozen_leaves_stay_whatever_follows(name):
    params = start(4, frozen=True)
    follows = {**ARITHMETIC, **NEUTRAL}[name]()
    after = run(optax.chain(zq.spsa(1e-2, key=KEY), follows), params)
    assert_same(after["w"], params["w"])


@pytest.mark.parametrize("name", ["adamw", "momentum", "MultiSteps", *FLOATS_ONLY])
def test_on_floats_lets_anything_follow(name):
    params = start()  # not even frozen
    follows = {**ARITHMETIC, **FLOATS_ONLY}[name]()
    tx = optax.chain(zq.spsa(1e-2, key=KEY), zq.on_floats(follows))
    after = run(tx, params)
    assert_same(after["w"], params["w"])
    moments = jax.tree.leaves(tx.init(params))
    assert not any(getattr(x, "shape", ()) == (8, 16) for x in moments)


def test_floats_train_beside_frozen_codes_in_a_scan():
    tx = optax.chain(zq.spsa(1e-2, key=KEY, num_queries=4), optax.adamw(0.05))
    params = start(frozen=True)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    (after, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, 50))((params, tx.init(params)))
    assert_same(after["w"], params["w"])
    assert jnp.sum(after["b"] ** 2) < 1.0


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_behind_changes_of_codes_is_refused(name):
    params = start()
    tx = optax.chain(METHODS["zoqo"](), ARITHMETIC[name]())
    with pytest.raises(ValueError, match=r"codes must stay uint8, got float32\[8, 16\]"):
        trace(tx, params)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "zoqo"])
def test_every_method_refuses_it(method):
    with pytest.raises(ValueError, match="codes must stay uint8"):
        trace(optax.chain(METHODS[method](), optax.scale(-1.0)), start(4))


@pytest.mark.parametrize("name", FLOATS_ONLY)
def test_what_jax_refuses_for_bytes_is_an_error_too(name):
    with pytest.raises((TypeError, ValueError)):
        trace(optax.chain(METHODS["zoqo"](), FLOATS_ONLY[name]()), start())


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_leaves_bytes_alone_composes(name):
    params = start(4)
    assert_same(
        run(optax.chain(METHODS["zoqo"](), NEUTRAL[name]()), params)["w"],
        run(METHODS["zoqo"](), params)["w"],
    )


@pytest.mark.parametrize(
    "around",
    [lambda tx: optax.apply_if_finite(tx, 3), lambda tx: optax.chain(optax.identity(), tx)],
    ids=["apply_if_finite", "chain"],
)
def test_what_goes_around_a_method_gives_its_run(around):
    params = start(4)
    zeros = jax.tree.map(jnp.zeros_like, params)  # apply_if_finite wants updates

    def end_of(tx):
        update = jax.jit(functools.partial(tx.update, value_fn=loss))
        state, now = tx.init(params), params
        for _ in range(2):
            updates, state = update(zeros, state, now)
            now = optax.apply_updates(now, updates)
        return now["w"]

    assert_same(end_of(around(METHODS["zoqo"]())), end_of(METHODS["zoqo"]()))


@pytest.mark.parametrize("chooses", [lambda x: x.dtype == jnp.float32, lambda x: x.size > 4])
def test_masks_that_split_an_array_are_refused(chooses):
    params = start(4, frozen=True)
    decay = optax.masked(optax.add_decayed_weights(0.1), lambda tree: jax.tree.map(chooses, tree))
    tx = optax.chain(zq.spsa(1e-2, key=KEY), decay)
    with pytest.raises(ValueError, match="mask must choose a QuantizedArray as a whole"):
        tx.init(params)


def test_averages_of_codes_are_refused():
    params = start()
    with pytest.raises(ValueError, match="codes must stay uint8"):
        optax.incremental_update(params, params, 0.5)


def test_trees_may_be_mapped_to_what_is_not_codes():
    params = start(4)
    assert jax.tree.map(lambda x: x.shape, params)["w"].packed == (8, 8)
    jax.tree.map(jnp.mean, params)  # scalars
    jax.tree.map(lambda x: (x == x).all(), params)
    jax.eval_shape(lambda p: p, params)
    jax.jit(lambda p: p)(params)

"""Around a method or a state: inject_hyperparams, MultiSteps, Flax's serialization.

Reported of kindred projects: google-deepmind/optax 412 (inject_hyperparams),
google/flax 2433 and 3001 (serialization of other classes).
"""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import zoqo_jax as zq

KEY = jax.random.key(0)
METHODS = {
    "zoqo": (zq.zoqo, {"learning_rate": 0.1, "radius": 0.1}),
    "caq_zo": (zq.caq_zo, {"learning_rate": 1.0}),
    "quzo": (zq.quzo, {"learning_rate": 1.0}),
    "qes": (zq.qes, {"learning_rate": 1.0}),
    "qzo": (zq.qzo, {"learning_rate": 1e-3, "radius": 1e-3}),
    "spsa": (zq.spsa, {"radius": 1e-2}),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("caq_zo", "quzo", "qes")]


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Optax's wrappers need it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def start():
    w = jax.random.normal(jax.random.key(1), (8, 16))
    return {"w": zq.Quantizer(bits=4)(w), "b": jnp.ones(3)}


def loss(params):
    return jnp.sum((params["w"] - 0.3) ** 2) + jnp.sum(params["b"] ** 2)


def run(tx):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    params, state = start(), jax.jit(tx.init)(start())
    for _ in range(2):
        params, state = step(params, state)
    return params, state


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["zoqo", *SLOW, "qzo", "spsa"])
def test_inject_hyperparams_gives_the_run_of_the_numbers(name):
    factory, numbers = METHODS[name]
    plain = run(factory(key=KEY, **numbers))[0]
    assert_same(run(optax.inject_hyperparams(factory)(key=KEY, **numbers))[0], plain)


def test_injected_numbers_can_be_changed_between_steps():
    tx = optax.inject_hyperparams(zq.zoqo)(learning_rate=0.1, radius=0.1, key=KEY)
    params, state = start(), tx.init(start())
    state.hyperparams["learning_rate"] = jnp.float32(1.0)
    updates, _ = jax.jit(lambda s: tx.update(None, s, params, value_fn=loss))(state)
    far = optax.apply_updates(params, updates)["w"].codes.astype(int)
    assert abs(far - params["w"].codes.astype(int)).max() > 1


@pytest.mark.parametrize("name", METHODS)
def test_injected_counts_are_refused_by_name(name, untyped):
    factory, numbers = METHODS[name]
    tx = optax.inject_hyperparams(factory)(key=KEY, num_queries=4, **numbers)
    with pytest.raises(ValueError, match=r"num_queries must be an int, got an array.*static_args"):
        tx.init(start())
    fixed = optax.inject_hyperparams(factory, static_args=("num_queries",))
    fixed(key=KEY, num_queries=4, **numbers).init(start())


@pytest.mark.parametrize("count", [2.5, "3", True])
def test_what_is_no_count_is_refused(count, untyped):
    with pytest.raises(ValueError, match="num_queries must be an int, got"):
        zq.zoqo(0.1, 0.1, key=KEY, num_queries=count)


def test_multi_steps_around_codes_is_refused_and_around_spsa_wants_zeros():
    zeros = jax.tree.map(jnp.zeros_like, start())
    over_codes = optax.MultiSteps(zq.zoqo(0.1, 0.1, key=KEY), 2)
    with pytest.raises(ValueError, match="codes must stay uint8"):
        over_codes.update(zeros, over_codes.init(start()), start(), value_fn=loss)
    floats = {"b": jnp.ones(3)}
    over_floats = optax.MultiSteps(zq.spsa(0.1, key=KEY), 2)
    look = lambda params: jnp.sum(params["b"] ** 2)  # noqa: E731
    over_floats.update(floats, over_floats.init(floats), floats, value_fn=look)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("frozen", [False, True])
def test_flax_serializes_codes_bit_for_bit(bits, frozen):
    make = zq.Quantizer(bits, range="minmax", block=8)
    params = {"w": make(jax.random.normal(KEY, (4, 16))), "b": jnp.ones(3)}
    params = zq.freeze(params) if frozen else params
    empty = {"w": make(jnp.ones((4, 16))), "b": jnp.zeros(3)}
    empty = zq.freeze(empty) if frozen else empty
    for again in (
        flax.serialization.from_bytes(empty, flax.serialization.to_bytes(params)),
        flax.serialization.from_state_dict(empty, flax.serialization.to_state_dict(params)),
    ):
        assert jax.tree.structure(again) == jax.tree.structure(params)
        assert_same(again, params)


def test_flax_refuses_another_array():
    state = flax.serialization.to_state_dict(zq.Quantizer(4)(jnp.ones((4, 16))))
    with pytest.raises(ValueError, match=r"packed must have shape \(4, 4\), got shape \(4, 8\)"):
        flax.serialization.from_state_dict(zq.Quantizer(4)(jnp.ones((4, 8))), state)
    with pytest.raises(ValueError, match="packed must have shape"):
        flax.serialization.from_state_dict(zq.Quantizer(4)(jnp.ones((4, 16))), {})


def test_a_state_is_serialized_with_the_words_of_its_key():
    tx = zq.zoqo(0.1, 0.1, key=KEY)
    state = tx.init(start())
    words = state._replace(key=jax.random.key_data(state.key))
    again = flax.serialization.from_bytes(words, flax.serialization.to_bytes(words))
    again = jax.tree.map(jnp.asarray, again)  # Flax gives NumPy arrays
    update = jax.jit(lambda state: tx.update(None, state, start(), value_fn=loss)[0])
    assert_same(update(state), update(again))


def test_flax_serializes_an_nnx_state():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    pure = nnx.to_pure_dict(zq.quantize(nnx.state(model, nnx.Param), zq.Quantizer(bits=4)))
    again = flax.serialization.from_bytes(pure, flax.serialization.to_bytes(pure))
    assert zq.is_quantized(again["kernel"])
    assert_same(again, pure)

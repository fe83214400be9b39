"""Keys of any generator give the run of the Threefry key: rbg draws other bits under vmap.

JAX documents it of "rbg" and "unsafe_rbg": "under vmap, random bits may vary".

Reported of kindred projects: jax-ml/jax 21663, documented since jax-ml/jax 22684.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoqo_jax as zq
from zoqo_jax.xla import random_bits

IMPLS = ["rbg", "unsafe_rbg"]
SHARED = {"num_queries": 3, "query_batch": None}
METHODS = {
    "zoqo": lambda key, **how: zq.zoqo(0.1, 0.1, key=key, **SHARED, **how),
    "caq_zo": lambda key, **how: zq.caq_zo(1.0, key=key, **SHARED, **how),
    "quzo": lambda key, **how: zq.quzo(1.0, key=key, **SHARED, **how),
    "qes": lambda key, **how: zq.qes(1.0, key=key, window=2, **SHARED, **how),
    "qzo": lambda key: zq.qzo(1e-3, 1e-3, key=key, **SHARED),
    "spsa": lambda key: optax.chain(zq.spsa(1e-2, key=key, **SHARED), zq.on_floats(optax.sgd(0.1))),
}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


SLOW = [slow(name) for name in ("caq_zo", "quzo", "qes", "qzo")]


def start():
    w = jax.random.normal(jax.random.key(0, impl="threefry2x32"), (4, 8))
    return {"w": zq.Quantizer(bits=8)(w), "b": jnp.ones(3)}


def loss(params):
    return jnp.sum((params["w"] - 0.3) ** 2) + jnp.sum(params["b"] ** 2)


def run(tx, state=None, steps=3):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    state = tx.init(start()) if state is None else state
    return jax.jit(lambda state: jax.lax.scan(step, (start(), state), None, steps)[0][0])(state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and bool((x == y).all())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", METHODS)
def test_a_run_has_the_threefry_key_of_its_seed(name, impl):
    of = lambda key: jax.tree.leaves(METHODS[name](key).init(start()))  # noqa: E731
    expected = of(jax.random.key(3, impl="threefry2x32"))
    assert_same(of(jax.random.key(3, impl=impl)), expected)
    with jax.default_prng_impl(impl):
        assert_same(of(jax.random.key(3)), expected)
        assert_same(of(jax.random.PRNGKey(3)), expected)


@pytest.mark.parametrize("structure", ["dense", *map(slow, ("rank_one", "sparse"))])
@pytest.mark.parametrize("name", ["zoqo", *SLOW[:3]])
def test_a_run_is_the_same_whatever_the_key_is_replaced_by(name, structure):
    how = {"structure": structure, **({"density": 0.5} if structure == "sparse" else {})}
    tx = METHODS[name](jax.random.key(0), **how)
    ends = []
    for impl in ("threefry2x32", "unsafe_rbg"):
        with jax.default_prng_impl(impl):
            state = tx.init(start())._replace(key=jax.random.key(3))
            ends.append(run(tx, state))
    assert_same(*ends)


@pytest.mark.parametrize("name", ["zoqo", *SLOW, slow("spsa")])
def test_vmapped_problems_equal_single_ones(name):
    keys = jax.random.split(jax.random.key(5, impl="unsafe_rbg"), 3)
    of = lambda key: run(METHODS[name](key), steps=2)  # noqa: E731
    together = jax.jit(jax.vmap(of))(keys)
    alone = jax.jit(of)
    for i, key in enumerate(keys):
        assert_same(jax.tree.map(lambda x, i=i: x[i], together), alone(key))


def test_the_quadratic_of_the_report_comes_down_with_an_rbg_key():
    params = zq.Quantizer(bits=8, range=1.0)(jnp.zeros((4, 8)))
    value_fn = lambda w: jnp.sum((w - 0.4) ** 2)  # noqa: E731
    decay = optax.exponential_decay(0.05, 50, 0.5)
    key = jax.random.key(3, impl="rbg")
    tx = zq.zoqo(decay, 0.05, num_queries=8, query_batch=None, key=key)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    state, before = tx.init(params), value_fn(params.materialise())
    for _ in range(150):
        params, state = step(params, state)
    assert value_fn(params.materialise()) < 0.01 * before


@pytest.mark.parametrize("impl", ["threefry2x32", *IMPLS])
def test_keys_that_are_split_or_mapped_over_stay_apart(impl):
    keys = jax.random.split(jax.random.key(0, impl=impl), 5)
    words = jax.random.key_data(random_bits.threefry(keys))
    assert len(np.unique(np.asarray(words), axis=0)) == 5
    one_by_one = [jax.random.key_data(random_bits.threefry(key)) for key in keys]
    np.testing.assert_array_equal(words, one_by_one)
    np.testing.assert_array_equal(words, jax.random.key_data(jax.vmap(random_bits.threefry)(keys)))


@pytest.mark.parametrize("impl", ["rbg", slow("unsafe_rbg")])
def test_adapters_and_audits_do_not_depend_on_the_generator(impl):
    params = {"w": jnp.ones((4, 4))}
    one, other = (
        zq.lora(params, 2, key=jax.random.key(1, impl=which), where=zq.is_matrix)
        for which in ("threefry2x32", impl)
    )
    assert_same(one, other)
    w = start()["w"]
    found = [
        zq.certificates.audit(
            lambda w: jnp.sum((w - 0.3) ** 2),
            w,
            jax.random.key(1, impl=which),
            support=4,
            gamma=1e-4,
        )
        for which in ("threefry2x32", impl)
    ]
    assert_same(*found)


@pytest.mark.parametrize("key", [0, None, "key", np.zeros(2), jnp.uint32(3)])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_key_is_refused_by_name(name, key, untyped):
    with pytest.raises(ValueError, match="key must be a key such as"):
        METHODS[name](key).init(start())


@pytest.mark.parametrize("name", METHODS)
def test_several_keys_are_refused(name, untyped):
    with pytest.raises(ValueError, match=r"key must be one key, got keys of shape \(2,\)"):
        METHODS[name](jax.random.split(jax.random.key(0), 2)).init(start())

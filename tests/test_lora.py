"""LoRA on the grid: products against the merged weights, and what transformations may move."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import by_turns

import zoqo_jax as zq
from zoqo_jax.implicit.lora import is_factor, is_lora, merge


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def is_weight(path, leaf):
    return path[-1].key == "w"


def adapted(weight, quantizer=zq.Quantizer(8, range=0.5), rank=2, **settings):  # noqa: B008
    """A tree with an adapter whose B, or whose core, is not zero."""
    tree = zq.lora({"w": weight, "bias": jnp.ones(3)}, rank, key=jax.random.key(1), where=is_weight,
                   quantizer=quantizer, **settings)  # fmt: skip
    name = "b" if tree["w"].core is None else "core"
    new = 0.3 * normal(*getattr(tree["w"], name).shape, seed=2)
    new = new if quantizer is None else quantizer(new)
    return eqx.tree_at(lambda tree: getattr(tree["w"], name), tree, new, is_leaf=zq.is_quantized)


KINDS = {"adapter": {}, "core": {"rank": None, "core": 3}}


BASES = {
    "floats": lambda x: x,
    "NF4": zq.nf4(block=8),
    "eight bits": zq.Quantizer(8),
}
PRODUCTS = {
    "x W^T": (lambda w, x, y: x @ w.T, False),
    "y W": (lambda w, x, y: y @ w, False),
    "W x^T": (lambda w, x, y: w @ x.T, False),
    "einsum": (lambda w, x, y: jnp.einsum("oi,bi->ob", w, x), False),
    "row": (lambda w, x, y: w @ x[0], False),
    "sum": (lambda w, x, y: (w * w).sum(0), True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("base", "product"), by_turns(BASES, PRODUCTS))
def test_products_are_those_of_the_merged_weights(base, product, kind):
    fn, _ = PRODUCTS[product]
    tree = adapted(BASES[base](normal(6, 16)), **KINDS[kind])
    x, y = normal(5, 16, seed=3), normal(5, 6, seed=4)
    merged = merge(tree)["w"]
    base, a, b, *core = map(zq.dequantize, tree["w"].arrays)
    expected = base + (b @ core[0] @ a if core else 2 * b @ a)
    np.testing.assert_allclose(merged, expected, atol=1e-5)
    found = jax.jit(zq.quaxify(lambda tree: fn(tree["w"], x, y)))(tree)
    np.testing.assert_allclose(found, fn(expected, x, y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_layers_are_scanned(kind):
    tree = adapted(zq.Quantizer(4, block=8)(normal(3, 16, 16)), **KINDS[kind])
    x = normal(5, 16, seed=3)

    def run(w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.T), None), x, w)[0]

    found = jax.jit(zq.quaxify(lambda tree: run(tree["w"])))(tree)
    np.testing.assert_allclose(found, run(merge(tree)["w"]), atol=1e-4)


WAYS_TO_A_LAYER = {
    "dynamic_index_in_dim": lambda w, i: jax.lax.dynamic_index_in_dim(w, i, keepdims=False),
    "[i]": lambda w, i: w[i],
    "[1]": lambda w, i: w[1],
    "[-3:, i][1]": lambda w, i: w[-3:][i],
    "take": lambda w, i: jnp.take(w, i, axis=0),
    "take_along_axis": lambda w, i: w[jnp.array([0, 1])[i]],
}


@pytest.mark.parametrize("way", WAYS_TO_A_LAYER)
@pytest.mark.parametrize(("base", "kind"), by_turns(["floats", "NF4"], KINDS))
def test_a_layer_of_a_stack_is_taken_from_the_factors(way, base, kind):
    """Whatever picks it: neither the stack nor the layer is merged."""
    tree = adapted(BASES[base](normal(3, 6, 16)), **KINDS[kind])
    x, take = normal(5, 16, seed=3), WAYS_TO_A_LAYER[way]

    def product(w, i):
        return x @ take(w, i).T

    found = jax.jit(zq.quaxify(product))(tree["w"], 1)
    np.testing.assert_allclose(found, product(merge(tree)["w"], 1), rtol=1e-4, atol=1e-4)
    told = zq.explain(lambda w: product(w, (x[0, 0] * 0).astype(jnp.int32) + 1).sum(), tree["w"])
    assert "materialize" not in str(told)
    assert "3x6x16  dot_general" not in str(told)


@pytest.mark.parametrize("structure", ["dense", "rank_one"])
def test_only_the_factors_move(structure):
    tree = adapted(zq.nf4(block=8)(normal(6, 16)))
    x = normal(5, 16, seed=3)
    tx = zq.zoqo(0.05, 0.05, key=jax.random.key(0), structure=structure)

    def value_fn(tree):
        return jnp.square(x @ tree["w"].T + tree["bias"][0]).mean()

    @jax.jit
    def step(tree, state):
        updates, state = tx.update(None, state, tree, value_fn=value_fn)
        return optax.apply_updates(tree, updates), state

    before, state = tree, tx.init(tree)
    first = value_fn(merge(tree))
    for _ in range(30):
        tree, state = step(tree, state)
    np.testing.assert_array_equal(tree["w"].base.codes, before["w"].base.codes)
    np.testing.assert_array_equal(tree["w"].base.scale, before["w"].base.scale)
    np.testing.assert_array_equal(tree["bias"], before["bias"])
    assert (tree["w"].a.codes != before["w"].a.codes).any()
    assert (tree["w"].b.codes != before["w"].b.codes).any()
    assert value_fn(merge(tree)) < 0.8 * first


def test_a_core_lies_between_the_first_principal_directions():
    """A full one can be any change, a small one those along the largest singular values."""
    weight = normal(2, 6, 4)
    w = adapted(weight, quantizer=None, rank=None, core=4)["w"]
    np.testing.assert_allclose(w.b @ w.a, weight, atol=1e-5)  # the core is the identity
    np.testing.assert_allclose(w.a @ w.a.mT, jnp.broadcast_to(jnp.eye(4), (2, 4, 4)), atol=1e-5)
    few = adapted(weight, quantizer=None, rank=None, core=2)["w"]
    np.testing.assert_array_equal(few.a, w.a[:, :2])
    np.testing.assert_array_equal(few.b, w.b[..., :2])
    singular = jnp.linalg.svd(weight, compute_uv=False)[:, :2]
    np.testing.assert_allclose(jnp.linalg.norm(few.b, axis=1), singular, rtol=1e-4)


def test_only_a_core_moves_and_its_log_replays_it():
    tree = zq.lora(
        {"w": zq.nf4(block=8)(normal(6, 16))}, core=3, key=jax.random.key(0), where=is_weight
    )
    x = normal(5, 16, seed=3)
    tx = zq.zoqo(key=jax.random.key(0), num_queries=4)

    @jax.jit
    def step(tree, state):
        value_fn = lambda tree: jnp.square(x @ tree["w"].T - 1.0).mean()  # noqa: E731
        updates, state = tx.update(None, state, tree, value_fn=value_fn)
        return optax.apply_updates(tree, updates), state

    trained, state, log, losses = tree, tx.init(tree), [], []
    for _ in range(40):
        trained, state = step(trained, state)
        log.append(state.info.log)
        losses.append(float(state.info.losses.mean()))
    assert np.mean(losses[-4:]) < 0.8 * losses[0]
    for name in ("base", "a", "b"):
        old, new = (jax.tree.leaves(getattr(one["w"], name)) for one in (tree, trained))
        jax.tree.map(np.testing.assert_array_equal, old, new)
    again = zq.replay(tree, jnp.stack(log), tx)
    np.testing.assert_array_equal(again["w"].core.packed, trained["w"].core.packed)
    assert (trained["w"].core.packed != tree["w"].core.packed).any()


def test_losses_are_those_at_the_displaced_factors():
    tree = adapted(zq.Quantizer(4, block=8)(normal(6, 16)))
    x = normal(5, 16, seed=3)
    tx = zq.zoqo(0.05, 0.05, key=jax.random.key(0))
    state = tx.init(tree)

    def value_fn(tree):
        return jnp.square(x @ tree["w"].T).mean()

    @jax.jit
    def both(tree, state):
        _, after = tx.update(None, state, tree, value_fn=value_fn)
        probes = tx.probes(state, tree)
        ends = [merge(zq.queries.endpoints(tree, probes, side)) for side in (1, -1)]
        return after.info.losses[0], jnp.stack([value_fn(end) for end in ends])

    np.testing.assert_allclose(*both(tree, state), rtol=1e-5)


@pytest.mark.parametrize(("kind", "count"), [("adapter", 2), ("core", 1)])
def test_float_factors_are_trained_by_a_gradient(kind, count):
    tree = adapted(zq.nf4(block=8)(normal(6, 16)), quantizer=None, **KINDS[kind])
    x = normal(5, 16, seed=3)
    trained, rest = eqx.partition(tree, is_factor(tree))

    def loss(trained):
        tree = eqx.combine(trained, rest)
        return jnp.square(zq.quaxify(lambda tree: x @ tree["w"].T)(tree)).mean()

    gradient = jax.jit(jax.grad(loss))(trained)
    assert len(jax.tree.leaves(gradient)) == count
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_a_fresh_adapter_changes_nothing():
    tree = zq.lora({"w": normal(6, 16)}, 4, key=jax.random.key(0), where=is_weight)
    np.testing.assert_array_equal(merge(tree)["w"], normal(6, 16))
    assert tree["w"].scaling == 2.0
    assert is_lora(tree["w"])


@pytest.mark.parametrize(
    ("grid", "range"),
    by_turns([zq.companders.identity(), zq.companders.nf4()], [0.1, 0.4]),
    ids=str,
)
def test_a_grid_coarser_than_the_start_of_an_adapter_does_not_lose_it(grid, range):
    def factor(quantizer):
        settings = {"key": jax.random.key(0), "where": is_weight, "quantizer": quantizer}
        return zq.lora({"w": jnp.ones((8, 576))}, 64, **settings)["w"].a

    start = factor(None)
    a = zq.dequantize(factor(zq.Quantizer(4, grid, range)))
    # On average A is what a float adapter begins with; rounding adds noise of the grid's own size.
    assert (a * start).mean() / (start**2).mean() == pytest.approx(1.0, abs=0.05)
    assert (a - start).std() < range / 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": None, "core": 0}, "core must be at least 1"),
        ({"rank": None, "core": 7}, r"core=7 is more than \['w'\] of shape \(6, 16\)"),
        ({"core": 2}, "either rank or core must be given, got 1 and 2"),
        ({"rank": None}, "either rank or core must be given, got None and None"),
        ({"rank": None, "core": 2, "alpha": 1.0}, "alpha=1.0 is not for core=2"),
        ({"quantizer": zq.Quantizer(4)}, "range in numbers, got 'absmax'"),
        ({"where": lambda path, leaf: False}, "chose none"),
        ({"where": lambda path, leaf: True}, r"\['bias'\] has the shape \(3,\)"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    tree = {"w": normal(6, 16), "bias": jnp.ones(3)}
    settings = {"rank": 1, "key": jax.random.key(0), "where": is_weight, **settings}
    with pytest.raises(ValueError, match=message):
        zq.lora(tree, **settings)

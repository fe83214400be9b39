"""Other people's trees as parameters: which leaves are quantized, and what stays as it is."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import NORMALLY
from flax import nnx

import zoqo_jax as zq

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
METHODS = {
    "zoqo": lambda: zq.zoqo(0.1, 0.1, key=KEY),
    "caq_zo": lambda: zq.caq_zo(30.0, key=KEY, structure="rank_one", boundary="clamp"),
    "quzo": lambda: zq.quzo(30.0, key=KEY),
    "qes": lambda: zq.qes(30.0, key=KEY, window=2),
    "qzo": lambda: zq.qzo(1e-3, 1e-3, key=KEY),
    "spsa": lambda: optax.chain(zq.spsa(1e-2, key=KEY), zq.on_floats(optax.adam(1e-2))),
}
FAST = ("caq_zo", "spsa")


class Everything(eqx.Module):
    """A module with all that Equinox's users have among the leaves of one."""

    table: eqx.nn.Embedding
    first: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    again: eqx.nn.Shared
    drop: eqx.nn.Dropout
    activation: object
    key: jax.Array
    shift: float
    is_shifted: bool
    empty: jax.Array
    nothing: None = None
    name: str = "everything"

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.table = eqx.nn.Embedding(8, 6, key=a)
        self.first = eqx.nn.Linear(6, 6, key=b)
        self.norm = eqx.nn.LayerNorm(6)
        last = eqx.nn.Linear(6, 8, use_bias=False, key=c)
        self.again = eqx.nn.Shared((self.table, last), lambda m: m[1].weight, lambda m: m[0].weight)
        self.drop = eqx.nn.Dropout(0.5)
        self.activation = jax.nn.gelu
        self.key, self.shift, self.is_shifted = key, 0.1, True
        self.empty = jnp.zeros(0)

    def __call__(self, x):
        x = x + self.shift if self.is_shifted else x
        x = x + self.table(jnp.argmax(x))
        x = self.norm(self.activation(self.first(x)))
        _, last = self.again()
        return last(self.drop(x, key=self.key))


def of_modules(module):
    logits = jax.vmap(module)(X)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(8) % 3).mean()


@pytest.fixture(autouse=True)
def _promotion_as_people_have_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(
    "name", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_all_of_an_equinox_module_but_its_weights_stays_as_it_is(name):
    module = Everything(KEY)
    params = zq.quantize(module, zq.Quantizer(bits=8))
    tx = METHODS[name]()

    @eqx.filter_jit
    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=of_modules)
        return zq.apply_updates(params, updates), state

    after, _ = step(params, tx.init(params))
    assert jax.tree.structure(after) == jax.tree.structure(params)
    moved = 0
    for old, new in zip(*map(leaves, (params, after)), strict=True):
        if zq.is_quantized(old):
            moved += bool((old.packed != new.packed).any()) and name != "spsa"
        elif isinstance(old, jax.Array) and name == "spsa" and zq.grids.arrays.is_float_array(old):
            moved += bool((old != new).any())
        elif isinstance(old, jax.Array):
            assert bool((old == new).all())
        else:
            assert old is new or (type(old) is type(new) and old == new)
    assert moved


def one_step(tx, loss, params):
    updates, _ = tx.update(None, tx.init(params), params, value_fn=loss)
    return zq.apply_updates(params, updates)


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=zq.is_quantized)


def test_the_tools_take_an_equinox_module():
    params = zq.quantize(Everything(KEY), zq.Quantizer(bits=8))
    np.testing.assert_allclose(
        eqx.filter_jit(zq.quaxify(of_modules))(params),
        eqx.filter_jit(of_modules)(zq.dequantize(params)),
        rtol=1e-5,
    )
    told = zq.explain(of_modules, params)
    assert told.is_fused and not told.unused
    found = {use.plan.algorithms for use in told.uses if use.label == ".table.weight"}
    assert ("take_rows",) in found
    assert ".first.weight" in str(zq.diagnose(params, radius=0.05))


def test_states_of_flax_with_keys_take_updates():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Linear(6, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.drop, self.last = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(self.norm(self.first(x))))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    params = zq.quantize(state, zq.Quantizer(bits=8))
    assert len([leaf for leaf in leaves(params) if zq.is_quantized(leaf)]) == 2

    def loss(state):
        return jnp.mean(nnx.merge(graph, state)(X) ** 2)

    tx = zq.zoqo(0.1, 0.1, key=KEY)
    after = jax.jit(one_step, static_argnums=(0, 1))(tx, loss, params)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    kernel = lambda tree: tree["first"]["kernel"].get_value()  # noqa: E731
    assert (kernel(after).packed != kernel(params).packed).any()


CHOSEN = {
    ("params", "Dense_0", "kernel"): (3, 1),
    ("norm1", "linear", "weight"): (3, 4),
    ("normal", "weight"): (3, 4),
    ("wpe", "embedding"): (9, 4),
    ("h", "0", "attn", "c_proj", "w"): (4, 4),
    ("mean", "kernel"): (4, 4),
    ("LayerNormMLP_0", "wi_kernel"): (4, 4),
    ("adaLN_modulation", "kernel"): (4, 4),
    ("pre_norm_block/~/attention/query", "w"): (4, 4),
    ("lora", "b"): (4, 4),
    ("h.scale_proj.weight",): (4, 4),
    ("fc_out",): (8, 1),
    (): (4, 1),
}
LEFT = {
    ("params", "LayerNorm_0", "scale"): (3, 4),
    ("layers", "ln_1", "weight"): (3, 4),
    ("layers", "norm", "weight"): (3, 4),
    ("batch_norm", "gamma"): (3, 4),
    ("batch_stats", "BatchNorm_0", "mean"): (3, 4),
    ("batch_stats", "SpectralNorm_0", "Dense_0/kernel/u"): (1, 4),
    ("ln1",): (3, 4),
    ("final_norm",): (3, 4),
    ("layers.norm1.weight",): (3, 4),
    ("block", "bq"): (3, 4),
    ("cache", "cached_key"): (2, 4, 4),
    ("attention", "bias"): (2, 4),
    ("linear", "b"): (3, 4),
    ("relative_position_bias_table",): (9, 4),
    ("cls_token",): (1, 1, 4),
    ("linear", "g"): (4, 1),
}


@pytest.mark.parametrize("names", [*CHOSEN, *LEFT], ids="/".join)
def test_the_default_choice_is_of_weights_that_multiply(names):
    path = tuple(jax.tree_util.DictKey(name) for name in names)
    assert zq.is_matrix(path, jnp.ones({**CHOSEN, **LEFT}[names])) == (names in CHOSEN)
    assert not zq.is_matrix(path, jnp.ones((4, 4), int))
    assert not zq.is_matrix(path, "kernel")


def test_a_head_of_zeros_trains_and_is_told():
    params = {"head": jnp.zeros((16, 4)), "body": jnp.ones((6, 16))}
    with pytest.warns(UserWarning, match=r"leaf \['head'\] is zero everywhere"):
        params = zq.quantize(params, zq.Quantizer(bits=4))
    assert np.asarray(params["head"].materialise() == 0).all()
    loss = lambda params: jnp.mean((X @ params["body"] @ params["head"] - 1.0) ** 2)  # noqa: E731
    tx = zq.zoqo(0.1, 0.1, key=KEY)
    after = jax.jit(one_step, static_argnums=(0, 1))(tx, loss, params)
    assert (after["head"].materialise() != 0).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zq.quantize({"head": jnp.zeros((16, 4))}, zq.Quantizer(bits=4, range=0.5))


@pytest.mark.parametrize("quantizer", [zq.Quantizer(8, range="mse"), zq.nf4(16)], ids=str)
def test_a_head_of_zeros_gets_the_same_range_where_its_values_are_not_known(quantizer):
    """Under `jax.jit` too, where nothing can be said of it: a scale of 0 could never train."""
    params = {"head": jnp.zeros((16, 4)), "body": jnp.ones((6, 16))}
    with pytest.warns(UserWarning, match="zero everywhere"):
        known = zq.quantize(params, quantizer)
    traced = jax.jit(lambda tree: zq.quantize(tree, quantizer))(params)
    assert (known["head"].scale > 0).all()
    for old, new in zip(jax.tree.leaves(known), jax.tree.leaves(traced), strict=True):
        np.testing.assert_array_equal(old, new)


def test_float64_weights_are_seen_as_float64():
    with jax.enable_x64(True):
        params = zq.quantize({"w": jnp.asarray(X, jnp.float64)}, zq.Quantizer(bits=8))
        assert zq.quaxify(lambda p: p["w"].T @ p["w"])(params).dtype == jnp.float64


def test_remat_costs_what_the_model_without_it_does():
    weights = [jnp.asarray(np.random.default_rng(i).normal(size=(256, 256))) for i in range(4)]
    params = zq.quantize([w.astype(jnp.float32) for w in weights], zq.Quantizer(bits=8))
    data = jnp.ones((4, 256))

    def temporaries(layer):
        def loss(weights):
            h = data
            for w in weights:
                h = layer(h, w)
            return jnp.mean(h**2)

        assert zq.explain(loss, params).is_fused
        program = jax.jit(zq.quaxify(loss)).lower(params).compile(compiler_options=NORMALLY)
        return program.memory_analysis().temp_size_in_bytes

    layer = lambda h, w: jnp.tanh(h @ w)  # noqa: E731
    assert temporaries(jax.checkpoint(layer)) <= 1.5 * temporaries(layer)

"""Products of integers are within their bound of those of floats, and serve training unchanged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoqo_jax as zq
from zoqo_jax import directions
from zoqo_jax.directions import integers
from zoqo_jax.grids import companders
from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.implicit import products
from zoqo_jax.implicit.arrays import PerturbedArray
from zoqo_jax.transforms import queries


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def asymmetric(values, bits, block=None):
    """Codes from zero on with a minimum for each block (axis -1), as Q4_1 has it."""
    length = block or values.shape[-1]
    blocks = values.reshape(values.shape[0], -1, length)
    low, high = blocks.min(-1), blocks.max(-1)
    scale = (high - low) / (2**bits - 1)
    codes = jnp.round((blocks - low[..., None]) / scale[..., None]).astype(jnp.uint8)
    grid = zq.Grid(tuple(float(i) for i in range(2**bits)), 0, 2**bits - 1)
    of_block = (-1, block) if block else None
    codes = codes.reshape(values.shape)
    return QuantizedArray.from_codes(codes, scale, low, grid, of_block, bits=bits)


def centred(values, bits):
    """Levels between whole numbers, -7.5 to 7.5 with four bits."""
    half = (2**bits - 1) / 2
    grid = zq.Grid(tuple(i - half for i in range(2**bits)), 0, 2**bits - 1)
    scale = jnp.abs(values).max().reshape(1, 1) / half
    codes = jnp.clip(jnp.round(values / scale + half), 0, 2**bits - 1).astype(jnp.uint8)
    return QuantizedArray.from_codes(codes, scale, None, grid, bits=bits)


ARRAYS = {  # of (outputs, inputs): vectors meet the last axis unless transposed
    "8 bits": lambda w: zq.Quantizer(8)(w),
    "8 bits by row": lambda w: zq.Quantizer(8, axis=0)(w),
    "4 bits": lambda w: zq.Quantizer(4)(w),
    "2 bits by row": lambda w: zq.Quantizer(2, axis=0)(w),
    "8 bits in blocks": lambda w: zq.Quantizer(8, block=32, axis=-1)(w),
    "8 bits in blocks of rows": lambda w: zq.Quantizer(8, block=10, axis=0)(w),
    "4 bits in blocks": lambda w: zq.Quantizer(4, block=32, axis=-1)(w),
    "8 bits, offset": lambda w: asymmetric(w, 8),
    "4 bits, offsets in blocks": lambda w: asymmetric(w, 4, 32),
    "4 bits, centred": lambda w: centred(w, 4),
    "float16 values": lambda w: dataclasses.replace(
        zq.Quantizer(8)(w), value_dtype=jnp.dtype("float16")
    ),
}
STRUCTURES = {
    "none": None,
    "rank_one": {"structure": "rank_one", "distribution": "rademacher"},
    "dense": {"structure": "dense", "distribution": "uniform"},
    "sparse": {"structure": "sparse", "distribution": "rademacher", "density": 0.25},
    "columns": {"structure": "columns", "distribution": "rademacher"},
}


def by_row(x, w):
    return x @ w.T


def by_column(x, w):
    return x @ w


def from_the_left(x, w):
    return w @ x.T


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    at = products.THRESHOLDS["cpu"]._replace(integer_block=1)
    monkeypatch.setitem(products.THRESHOLDS, "cpu", at)


CASES = [
    *((name, "dense") for name in ARRAYS),
    *(("8 bits", structure) for structure in ("none", "rank_one", "sparse", "columns")),
    *(("4 bits in blocks", structure) for structure in ("none", "rank_one", "sparse")),
]


@pytest.mark.parametrize(("name", "structure"), CASES)
def test_a_product_is_within_half_a_step_of_the_vector(name, structure):
    array = zq.with_products(ARRAYS[name](normal(0, 48, 96) / 10), "integer")
    for fn, inputs in ((by_row, 96), (by_column, 48), (from_the_left, 96)):
        x = normal(1, 5, inputs).astype(array.dtype)
        w = array
        if STRUCTURES[structure] is not None:
            choices = STRUCTURES[structure]
            w = PerturbedArray(array, directions.describe(jax.random.key(0), array, 2.0, **choices))
        values = np.asarray(w.materialise(), np.float64)
        values = values.T if fn is not by_column else values
        exact = np.asarray(x, np.float64) @ values
        got = jax.jit(lambda x, w, fn=fn: zq.quaxify(fn)(x, w))(x, w)
        assert got.dtype == array.dtype
        got = np.asarray(got.T if fn is from_the_left else got, np.float64)
        bound = np.abs(x).max(1, keepdims=True) / 254 * np.abs(values).sum(0)
        bound = bound + 1e-5 + (2e-3 * np.abs(values).sum(0) if name == "float16 values" else 0)
        assert (np.abs(got - exact) <= bound).all()


def plans(fn, *args):
    found = zq.explain(lambda w: fn(w).sum(), *args)
    return [str(use.plan) for use in found.uses]


def test_the_error_is_that_of_rounded_vectors_and_nothing_else():
    array, x = zq.with_products(zq.Quantizer(8)(normal(0, 96, 48)), "integer"), normal(1, 5, 96)
    q, step = integers.rounded(x, (1,))
    expected = (q.astype(jnp.float32) * step) @ array.materialise()
    got = zq.quaxify(jnp.matmul)(x, array)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert abs(got - x @ array.materialise()).max() > 1e-3  # it was rounded


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_vector_and_stacks_of_vectors(bits):
    array = zq.with_products(zq.Quantizer(bits)(normal(0, 96, 48)), "integer")
    x = normal(1, 2, 3, 96)
    all_at_once = zq.quaxify(jnp.matmul)(x, array)
    for one_by_one in (
        jax.vmap(jax.vmap(lambda x: zq.quaxify(jnp.matmul)(x, array)))(x),
        jnp.stack([jnp.stack([zq.quaxify(jnp.matmul)(v, array) for v in m]) for m in x]),
    ):
        np.testing.assert_allclose(one_by_one, all_at_once, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("contracted", [(0,), (0, 1), (1, 2)])
def test_several_axes(contracted):
    array = zq.with_products(zq.Quantizer(8)(normal(0, 6, 8, 10)), "integer")
    shape = tuple(array.shape[axis] for axis in contracted)
    x = normal(1, 4, *shape)
    dims = (tuple(range(1, 1 + len(shape))), contracted)
    got = zq.quaxify(lambda x, w: jax.lax.dot_general(x, w, (dims, ((), ()))))(x, array)
    exact = jnp.tensordot(x, array.materialise(), dims)
    bound = jnp.abs(x).max() / 254 * jnp.abs(array.materialise()).sum(contracted)
    assert (abs(got - exact) <= bound + 1e-5).all()


def test_a_nan_stays_a_nan_and_zeros_stay_zeros():
    array = zq.with_products(zq.Quantizer(8)(normal(0, 8, 4)), "integer")
    x = jnp.zeros((3, 8)).at[1, 2].set(jnp.nan).at[2, 2].set(jnp.inf)
    got = zq.quaxify(jnp.matmul)(x, array)
    assert (got[0] == 0).all() and not jnp.isfinite(got[1:]).any()


def test_plans_say_what_is_integer_and_what_not(monkeypatch):
    x = normal(1, 5, 96)
    w = zq.with_products(zq.Quantizer(8)(normal(0, 96, 48)), "integer")
    assert plans(lambda w: x @ w, w) == ["low_rank / integer"]
    dense = zq.explain(lambda w: (x @ w).sum(), w, structure="dense", noise="uniform")
    assert [str(use.plan) for use in dense.uses] == ["integer"]
    assert dense.decoded_bytes(dense.uses[0]) == 96 * 48
    changed = plans(lambda w: x @ (2 * w), w)
    assert changed == ["dequantize (no integers: operations changed it)"]
    nf4 = zq.with_products(zq.nf4(block=32)(normal(0, 96, 48)), "integer")
    assert plans(lambda w: x @ w, nf4) == [
        "dequantize, 2 parts (no integers: the grid is not uniform)"
    ]

    at = products.THRESHOLDS["cpu"]._replace(integer_block=64)
    monkeypatch.setitem(products.THRESHOLDS, "cpu", at)
    short = zq.with_products(ARRAYS["8 bits in blocks"](normal(0, 48, 96)), "integer")
    assert plans(lambda w: x @ w.T, short) == [
        "dequantize (no integers: blocks of 32 are too short)"
    ]
    assert "scales along the contracted axes" in plans(lambda w: x[:, :48] @ w, short)[0]
    rows = zq.with_products(zq.Quantizer(8, axis=0)(normal(0, 48, 96)), "integer")
    assert plans(lambda w: x @ w.T, rows) == ["integer"]


@pytest.mark.parametrize("structure", ["dense", "rank_one", "sparse"])
def test_a_step_by_vmap_is_a_step_in_turn(structure):
    x = normal(1, 5, 96)
    params = {"a": zq.Quantizer(8)(normal(0, 96, 48) / 10), "b": zq.Quantizer(4)(normal(2, 48, 8))}
    params = zq.with_products(params, "integer")

    def loss(params):
        return jnp.mean(jnp.tanh(x @ params["a"]) @ params["b"] - 1.0) ** 2

    new = []
    for sides in ("together", "in_turn"):
        tx = zq.caq_zo(1.0, key=jax.random.key(0), num_queries=4, structure=structure, sides=sides)

        @jax.jit
        def step(params, state, tx=tx):
            updates, state = tx.update(None, state, params, value_fn=loss)
            return zq.apply_updates(params, updates), state

        new.append(step(params, tx.init(params)))
    (first, state), (_, other) = new
    np.testing.assert_allclose(
        state.info.loss_differences, other.info.loss_differences, rtol=1e-3, atol=1e-6
    )
    assert first["a"].products == "integer"
    moved = (first["a"].codes != params["a"].codes).sum()
    assert moved > 0


def test_losses_at_displaced_codes_are_those_of_floats_but_for_the_bound():
    x = normal(1, 64, 96)
    array = zq.Quantizer(8)(normal(0, 96, 48) / 10)
    direction = directions.describe(jax.random.key(0), array, 8.0, structure="dense")

    def loss(w):
        return jnp.mean((x @ w) ** 2)

    of = lambda w: queries.losses(loss, w, [direction], center=True)  # noqa: E731
    floats, whole = of(array), of(zq.with_products(array, "integer"))
    np.testing.assert_allclose(whole, floats, rtol=2e-3)
    assert (floats != whole).all()


def test_where_and_what():
    params = {"a": zq.Quantizer(8)(normal(0, 4, 4)), "b": zq.nf4()(normal(0, 4, 64))}
    chosen = zq.with_products(params, "integer", lambda path, leaf: path[-1].key == "a")
    assert chosen["a"].products == "integer" and chosen["b"].products == "float"
    assert zq.with_products(chosen, "float")["a"].products == "float"
    with pytest.raises(ValueError, match="products must be one of"):
        zq.with_products(params, "int8")
    mu_law = zq.Quantizer(4, companders.mu_law())(normal(0, 4, 64))
    got = zq.quaxify(jnp.matmul)(normal(1, 2, 4), zq.with_products(mu_law, "integer"))
    assert (got == zq.quaxify(jnp.matmul)(normal(1, 2, 4), mu_law)).all()

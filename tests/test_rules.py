"""Every operation with a rule gives what it gives on the materialised array.

Products agree to the roundings of their floats; whatever moves, picks or decodes rows agrees bit
for bit.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import zoqo_jax as zq
from zoqo_jax import directions
from zoqo_jax.grids import companders
from zoqo_jax.implicit import kernels, products
from zoqo_jax.transforms import queries

slow = functools.partial(pytest.param, marks=pytest.mark.slow)

GRIDS = {
    # few codes at the edges: shared products and corrections
    "shared": zq.Quantizer(8),
    # a fifth of them: too many to correct
    "crowded": zq.Quantizer(8, range="percentile", percentile=80.0),
    # blocks that the last axis, 20 or 24 long, does not divide into; two codes a byte
    "blocks": zq.Quantizer(4, range="minmax", block=7),
    "nf4": zq.Quantizer(4, companders.nf4(), range="percentile", percentile=80.0, block=8),
    "two bits": zq.Quantizer(2, range="percentile", percentile=80.0, axis=-1),
}
DIRECTIONS = {
    "rank_one": {"structure": "rank_one", "distribution": "rademacher"},
    "dense": {"structure": "dense", "distribution": "uniform"},
    "sparse": {"structure": "sparse", "distribution": "rademacher", "density": 0.2},
    "columns": {"structure": "columns", "distribution": "rademacher", "density": 0.2},
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def probe(array, i=0, direction="rank_one", boundary="clamp"):
    width = array.grid.high / 6.0
    key = jax.random.fold_in(jax.random.key(5), i)
    return directions.describe(key, array, width, boundary=boundary, **DIRECTIONS[direction])


def values(array, stencil, side):
    u = jnp.asarray(side, jnp.int16) * stencil.draw(array)
    return array.decode(directions.displace(array.codes, u, array.grid, stencil.boundary))


def over_sides_and_queries(fn, array, queries_, **choices):
    """`fn` of the implicit array for every query and side, and of the materialised one."""
    sides = jnp.array([1, -1], jnp.int8)

    def implicit(i):
        stencil = probe(array, i, **choices)
        population = 2 * queries_

        def one(side):
            return zq.quaxify(fn)(zq.PerturbedArray(array, stencil.flipped(side), population))

        return jax.vmap(one)(sides)

    def plain(i):
        stencil = probe(array, i, **choices)
        return jax.lax.map(lambda side: fn(values(array, stencil, side)), sides)

    @jax.jit
    def both(i):
        return jax.vmap(implicit)(i), jax.lax.map(plain, i)

    return both(jnp.arange(queries_))


def layouts(w):
    """A (6, 10, 20) kernel as models use it, and matrices cut from it."""
    x = normal(1, 5, 6)
    heads = normal(2, 5, 6, 10)
    last = normal(3, 5, 20)
    matrix = w[2]
    return {
        "DenseGeneral in": jnp.einsum("bi,iho->bho", x, w),
        "DenseGeneral out": jnp.einsum("bih,iho->bo", heads, w),
        "einsum, kernel first": jnp.einsum("iho,bi->hob", w, x),
        "last axis contracted": jnp.einsum("bo,iho->bih", last, w),
        "last and first contracted": jnp.einsum("bio,iho->bh", normal(4, 5, 6, 20), w),
        "experts (batched)": jnp.einsum("ibh,iho->ibo", normal(5, 6, 5, 10), w),
        "batched over the last": jnp.einsum("boi,iho->obh", normal(6, 5, 20, 6), w),
        "transposed": jnp.einsum("bo,oih->bih", last, jnp.transpose(w, (2, 0, 1))),
        "transposed free axes": jnp.einsum("bo,hio->bhi", last, jnp.transpose(w, (1, 0, 2))),
        "reshaped rows": heads.reshape(5, 60) @ w.reshape(60, 20),
        "one layer": normal(7, 5, 10) @ matrix,
        "tied head": last @ matrix.T,
        "torch layout": jax.vmap(lambda v: matrix @ v)(last),
        "sliced": normal(8, 5, 4) @ matrix[2:6],
        "all contracted": jnp.einsum("iho,iho->", w, normal(9, 6, 10, 20)),
        "double transpose": normal(7, 5, 10) @ matrix.T.T,
        "with itself": matrix @ matrix.T,
    }


@pytest.mark.parametrize(
    ("grid", "direction", "boundary", "queries_"),
    [
        slow("shared", "rank_one", "clamp", 1),  # 16 s
        ("blocks", "dense", "clamp", 1),
        slow("nf4", "rank_one", "clamp", 2),
        slow("nf4", "rank_one", "clamp", 3),  # 20 s
        slow("shared", "rank_one", "mask", 3),
        slow("shared", "rank_one", "reflect", 1),
        slow("crowded", "rank_one", "clamp", 1),
        slow("crowded", "rank_one", "mask", 3),
        slow("crowded", "rank_one", "reflect", 3),
        slow("two bits", "rank_one", "clamp", 3),
        slow("two bits", "sparse", "mask", 1),
        slow("blocks", "rank_one", "reflect", 3),
        slow("nf4", "sparse", "clamp", 3),
        slow("nf4", "dense", "reflect", 3),
        slow("blocks", "sparse", "mask", 1),
    ],
)
def test_products_in_every_layout_are_those_of_the_values(grid, direction, boundary, queries_):
    array = GRIDS[grid](normal(0, 6, 10, 20))
    choices = {"direction": direction, "boundary": boundary}
    actual, expected = over_sides_and_queries(layouts, array, queries_, **choices)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=2e-5, atol=2e-5, err_msg=name)
        if array.grid.high > 3:
            assert abs(expected[name][:, 0] - expected[name][:, 1]).max() > 1e-2, name


@pytest.mark.parametrize(
    ("grid", "direction"),
    [("nf4", "dense"), slow("shared", "rank_one"), slow("blocks", "rank_one")],
)
def test_large_tables_are_multiplied_in_pieces(grid, direction, monkeypatch):
    small = products.THRESHOLDS["cpu"]._replace(chunk=100)
    monkeypatch.setitem(products.THRESHOLDS, jax.default_backend(), small)
    array = GRIDS[grid](normal(0, 23, 24))
    x = normal(1, 2, 5, 24)

    def fn(w):
        return {"head": x @ w.T, "w first": jnp.einsum("vd,sbd->vsb", w, x)}

    actual, expected = over_sides_and_queries(fn, array, 2, direction=direction)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("grid", ["nf4", slow("blocks"), slow("two bits")])
def test_the_gpu_kernel_stands_behind_the_same_rule(grid, monkeypatch):
    monkeypatch.setenv("ZOQO_JAX_KERNELS", "interpret")
    array = GRIDS[grid](normal(0, 16, 32))
    x = normal(1, 2, 5, 16)

    def fn(w):
        out = {"x @ w": x @ w, "w first": jnp.einsum("io,sbi->osb", w, x)}
        return {**out, "transposed": normal(2, 3, 32) @ w.T}

    calls = []
    kernel = kernels.rank_one_product
    monkeypatch.setattr(
        kernels, "rank_one_product", lambda *args, **more: calls.append(1) or kernel(*args, **more)
    )
    actual, expected = over_sides_and_queries(fn, array, 1)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=2e-5, atol=2e-5)
    assert bool(calls) == kernels.supports(array)
    monkeypatch.setenv("ZOQO_JAX_KERNELS", "always")
    with pytest.raises(ValueError, match="must be off, on or interpret, got 'always'"):
        over_sides_and_queries(fn, array, 1)


@pytest.mark.parametrize("boundary", ["clamp", slow("mask"), slow("reflect")])
@pytest.mark.parametrize("crowded", [0, slow(1), 7, slow(33), slow(200)])
def test_corrections_make_shared_products_exact_however_many_slices_touch_an_edge(
    crowded, boundary
):
    rows = 200
    array = zq.Quantizer(8, range=1.275)(0.3 * jnp.tanh(normal(0, rows, 12)))
    edges = jnp.arange(rows)[:, None] % (rows // crowded) == 0 if crowded else jnp.zeros((rows, 1))
    at_edge = jnp.where(normal(1, rows, 12) > 0, 255, 1)
    array = array.with_codes(jnp.where(edges, at_edge, array.codes))
    x = normal(2, 4, rows)
    actual, expected = over_sides_and_queries(
        lambda w: {"in": x @ w, "out": normal(3, 5, 12) @ w.T}, array, 2, boundary=boundary
    )
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=2e-5, atol=2e-5)


def test_products_in_bfloat16_err_by_roundings_of_bfloat16():
    """2^-8 of the sum of magnitudes for each rounding: values, product, correction, sum."""
    array = GRIDS["shared"](normal(0, 64, 24).astype(jnp.bfloat16))
    x = normal(1, 8, 64).astype(jnp.bfloat16)
    actual, _ = over_sides_and_queries(lambda w: x @ w, array, 1)
    assert actual.dtype == jnp.bfloat16
    x32 = x.astype(jnp.float32)
    for i, side in enumerate((1, -1)):
        exact = values(array, probe(array), side).astype(jnp.float32)
        size = abs(x32) @ abs(exact)
        assert (abs(actual[0, i].astype(jnp.float32) - x32 @ exact) < 4 * 2.0**-8 * size).all()


def rows_of(w):
    """What moves or picks rows of a (6, 10, 20) array."""
    ids = jnp.array([[3, 0, 5], [1, 1, 4]])
    table = w.reshape(60, 20)
    return {
        "look up": jnp.take(table, ids * 11, axis=0),
        "look up out of bounds": jnp.take(table, jnp.array([5, 60, -61]), axis=0),
        "look up clipped": jnp.take(table, jnp.array([5, 99]), axis=0, mode="clip"),
        "index": table[jnp.array([7, 2])],
        "two indices": w[ids, ids],
        "layer": w[4] + 0.0,
        "traced layer": w[ids[0, 0] + 1] + 0.0,
        "slice": w[1:5:2, 3:] + 0.0,
        "dynamic slice": jax.lax.dynamic_slice_in_dim(w, ids[0, 2], 2) + 0.0,
        "new axes": w[None, :, None] + 0.0,
        "reshape": w.reshape(2, 30, 20) + 0.0,
        "reshape of the last axis": w.reshape(6, 200) + 0.0,
        "slice of the last axis": w[..., 3:9] + 0.0,
        "transpose": w.transpose(2, 0, 1) + 0.0,
        "bfloat16": w.astype(jnp.bfloat16) + jnp.bfloat16(0),
        "flip": w[::-1],
        "look up of columns": jnp.take(table, jnp.array([1, 2]), axis=1),
        "scan": jax.lax.scan(lambda c, layer: (c, layer[3] + 0.0), 0.0, w)[1],
        "scan over rows": jax.lax.scan(lambda c, row: (c, row + 0.0), 0.0, table)[1],
        "cond": jax.lax.cond(ids[0, 0] > 2, lambda: w[0] + 0.0, lambda: w[1] * 2.0),
    }


@pytest.mark.parametrize(
    ("grid", "direction"),
    [
        ("nf4", "dense"),
        slow("blocks", "rank_one"),
        slow("shared", "sparse"),
        slow("two bits", "rank_one"),
        slow("two bits", "sparse"),
        slow("shared", "rank_one"),
    ],
)
def test_rows_are_those_of_the_values_bit_for_bit(grid, direction):
    array = GRIDS[grid](normal(0, 6, 10, 20))
    actual, expected = over_sides_and_queries(rows_of, array, 1, direction=direction)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
    assert jnp.isnan(expected["look up out of bounds"]).any()


@pytest.mark.parametrize("axis", [slow(0), slow(1)])
def test_rows_of_blocks_along_rows_are_those_of_the_values(axis):
    array = zq.Quantizer(4, range="minmax", axis=axis, block=4)(normal(0, 6, 10, 20))
    actual, expected = over_sides_and_queries(rows_of, array, 1)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def test_quantized_arrays_that_are_not_displaced_follow_the_same_rules():
    array = GRIDS["blocks"](normal(0, 6, 10, 20))
    for fn in (layouts, rows_of):
        actual, expected = jax.jit(lambda w, fn=fn: (zq.quaxify(fn)(w), fn(w.materialise())))(array)
        for name in expected:
            np.testing.assert_allclose(
                actual[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name
            )


@pytest.mark.parametrize(
    ("strides", "groups"), [((1, 1), 1), slow((2, 1), 1), slow((1, 1), 2)], ids=str
)
def test_convolutions_are_those_of_the_values(strides, groups):
    array = GRIDS["crowded"](normal(0, 3, 3, 4, 6))
    x = normal(1, 2, 8, 8, 4 * groups)

    def convolve(w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            strides,
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    for direction in ("rank_one", "dense"):
        actual, expected = over_sides_and_queries(convolve, array, 2, direction=direction)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# Models


def linen_attention():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(24, 16)(tokens)
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(x, x)
            return nn.DenseGeneral((2, 3), axis=(-2, -1))(x.reshape(*x.shape[:-1], 4, 4))

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 7)))
    model = Model()
    params = model.init(jax.random.key(0), tokens)
    return lambda params: jnp.mean((model.apply(params, tokens) - 1.0) ** 2), params


def nnx_attention():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(24, 16, rngs=rngs)
            self.attend = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
            self.mix = nnx.Einsum("btd,dhk->bthk", (16, 4, 8), rngs=rngs)
            self.conv = nnx.Conv(16, 16, (3,), rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            x = self.conv(x + self.attend(x))
            x = x + self.mix(x).reshape(*x.shape[:-1], 32)[..., :16]
            return self.embed.attend(x)

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 7)))
    graph, params = nnx.split(Model(nnx.Rngs(0)))
    return lambda params: jnp.mean((nnx.merge(graph, params)(tokens) - 1.0) ** 2), params


MODELS = {"linen": linen_attention, "nnx": nnx_attention}


@pytest.mark.parametrize(
    ("model", "grid", "direction"),
    [
        ("linen", "shared", "rank_one"),
        slow("linen", "blocks", "dense"),
        slow("nnx", "shared", "rank_one"),
        slow("nnx", "nf4", "rank_one"),
        slow("linen", "nf4", "sparse"),
    ],
)
def test_attention_with_its_embeddings_and_heads_is_queried_exactly(model, grid, direction):
    value_fn, params = MODELS[model]()
    params = zq.quantize(params, GRIDS[grid])
    leaves = [x for x in jax.tree.leaves(params, is_leaf=zq.is_quantized) if zq.is_quantized(x)]
    assert any(leaf.ndim == 3 for leaf in leaves)

    @jax.jit
    def two_ways(params):
        probes = [probe(leaf, i, direction) for i, leaf in enumerate(leaves)]

        def plain(side):
            remaining = iter(probes)
            return value_fn(
                jax.tree.map(
                    lambda x: values(x, next(remaining), side) if zq.is_quantized(x) else x,
                    params,
                    is_leaf=zq.is_quantized,
                )
            )

        expected = jax.lax.map(plain, jnp.array([1, -1], jnp.int8))
        return queries.losses(value_fn, params, probes), expected

    actual, expected = two_ways(params)
    np.testing.assert_allclose(actual, expected, rtol=2e-5)
    assert abs(expected[0] - expected[1]) > 1e-3


@pytest.mark.parametrize("model", ["linen", slow("nnx")])
def test_attention_keeps_every_leaf_implicit(model):
    value_fn, params = MODELS[model]()
    told = zq.explain(value_fn, zq.quantize(params, GRIDS["shared"]))
    assert told.is_fused and not told.unused
    found = {(use.operation, use.plan.algorithms[0]) for use in told.uses}
    assert ("gather", "take_rows") in found and ("dot_general", "low_rank") in found


# Explanations


def test_explain_names_every_use_once_and_says_what_it_costs():
    params = zq.quantize(
        {"a": normal(0, 6, 20), "b": normal(1, 20, 8), "c": normal(2, 4, 4), "d": normal(3, 4, 4)},
        zq.nf4(block=4),
    )

    def value_fn(params):
        x = jnp.tanh(jnp.ones((5, 6)) @ params["a"])
        return jnp.sum(x @ params["b"]) + jnp.sum(jnp.sin(params["c"]) + jnp.sin(params["c"]))

    told = zq.explain(value_fn, params)
    assert [(use.label, use.operation, use.plan.algorithms) for use in told.uses] == [
        ("['a']", "dot_general", ("dequantize",)),
        ("['b']", "dot_general", ("dequantize",)),
        ("['c']", "sin", ("materialize",)),
    ]
    assert told.unused == ("['d']",) and not told.is_fused
    # Two codes share a byte: half of the matrix is decoded at a time.
    assert told.decoded_bytes(told.uses[0]) == 4 * 6 * 20 / 2
    assert told.multiplications(told.uses[0]) == 2 * 5 * 6 * 20
    assert "sin" in str(told) and "['d']" in str(told)
    together = zq.explain(value_fn, params, query_batch=8)
    assert together.uses[0].plan.algorithms[0] == "mean_difference"
    assert together.decoded_bytes(together.uses[0]) == 2 * 4 * 6 * 20 / 2


def test_explain_refuses_what_it_cannot_explain():
    params = zq.quantize({"w": normal(0, 4, 4)}, zq.Quantizer(8))
    with pytest.raises(ValueError, match="query_batch must be at least 1, got 0"):
        zq.explain(lambda p: p["w"].sum(), params, query_batch=0)
    with pytest.raises(ValueError, match="params must hold a QuantizedArray"):
        zq.explain(lambda p: p["w"].sum(), {"w": normal(0, 4, 4)})
    with pytest.raises(ValueError, match="value_fn must return a real scalar"):
        zq.explain(lambda p: p["w"], params)


def test_watching_ends_with_the_explanation():
    from zoqo_jax.implicit import arrays as implicit

    params = zq.quantize({"w": normal(0, 4, 4)}, zq.Quantizer(8))
    with pytest.raises(ZeroDivisionError):
        zq.explain(lambda p: 1 / 0, params)
    assert not implicit._watchers


@pytest.mark.parametrize("grid", ["blocks", slow("nf4"), slow("shared")])
def test_a_product_can_be_differentiated_by_its_input_and_its_scales(grid):
    """As an adapter beside frozen codes is trained, or the scales of codes."""
    array, x = GRIDS[grid](normal(0, 20, 24)), normal(1, 5, 20) / 20

    def loss(x, scale, how):
        w = dataclasses.replace(array, scale=scale)
        return jnp.sum(jnp.sin(how(lambda w: (x @ w) @ w.T)(w)))

    def materialised(fn):
        return lambda w: fn(w.materialise())

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    actual, expected = (gradient(x, array.scale, how) for how in (zq.quaxify, materialised))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), actual, expected
    )

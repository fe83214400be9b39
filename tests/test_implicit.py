"""Queries by implicit arrays give unmodified models' losses at the displaced codes.

The counterpart of every implicit query is built by hand: draw the direction, displace the codes,
decode them, and hand the model plain floats.
"""

import functools

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from choosing import by_turns
from flax import linen as nn
from flax import nnx

import zoqo_jax as zq
from zoqo_jax import directions
from zoqo_jax.grids import companders
from zoqo_jax.transforms import queries

# Two float32 programs that sum the same numbers in different orders.
RTOL = 2e-5

QUANTIZERS = {  # each leaves a good part of the codes at the edges of its grid
    "uniform": zq.Quantizer(8, range="percentile", percentile=80.0, axis=-1),
    "nf4": zq.Quantizer(4, companders.nf4(), range="percentile", percentile=80.0, block=8),
    "mu_law": zq.Quantizer(4, companders.mu_law(), range="percentile", percentile=80.0),
}
BOUNDARIES = ["clamp", "mask", "reflect"]
STRUCTURES = {
    "rank_one": {"structure": "rank_one", "distribution": "rademacher"},
    "rank_one_uniform": {"structure": "rank_one", "distribution": "uniform"},
    "dense": {"structure": "dense", "distribution": "uniform"},
    "sparse": {"structure": "sparse", "distribution": "gaussian", "density": 0.5},
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def quantized_leaves(params):
    leaves = jax.tree.leaves(params, is_leaf=zq.is_quantized)
    return [leaf for leaf in leaves if zq.is_quantized(leaf)]


def describe(params, **choices):
    """A stencil for every quantized leaf, a sixth of its grid wide."""
    return [
        directions.describe(
            jax.random.fold_in(jax.random.key(17), i), array, array.grid.high / 6.0, **choices
        )
        for i, array in enumerate(quantized_leaves(params))
    ]


def displaced(params, probes, side):
    """Plain floats: the values at `n + side * u`, the arithmetic of the boundary included."""
    remaining = iter(probes)

    def one(leaf):
        if not zq.is_quantized(leaf):
            return leaf
        stencil = next(remaining)
        u = stencil.draw(leaf)
        side_u = jnp.asarray(side, jnp.int16) * u
        return leaf.decode(directions.displace(leaf.codes, side_u, leaf.grid, stencil.boundary))

    return jax.tree.map(one, params, is_leaf=zq.is_quantized)


def assert_implicit_is_materialised(value_fn, params, rtol=RTOL, **choices):
    """The three losses, two ways, which differ by far more than the tolerance among themselves."""

    @jax.jit
    def two_ways(params):
        probes = describe(params, **choices)
        expected = jax.lax.map(
            lambda side: value_fn(displaced(params, probes, side)), jnp.array([1, -1, 0], jnp.int8)
        )
        return queries.losses(value_fn, params, probes, center=True), expected

    implicit, expected = two_ways(params)
    assert implicit.dtype == jnp.float32 and implicit.shape == (3,)
    np.testing.assert_allclose(implicit, expected, rtol=rtol)
    assert abs(jnp.diff(implicit)).min() > 20 * rtol * implicit.max()


def assert_at_edges(params):
    for leaf in quantized_leaves(params):
        assert (leaf.codes == leaf.grid.low).any() and (leaf.codes == leaf.grid.high).any()


# Models, none of which knows of quantization: each gives (value_fn of its floats, its floats)


class Mlp(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(dtype=self.dtype)(nn.Dense(16, dtype=self.dtype)(x))
        return nn.Dense(4, dtype=self.dtype)(nn.relu(x))


def linen_mlp():
    model, x = Mlp(), normal(0, 8, 12)
    params = model.init(jax.random.key(0), x)
    return lambda params: jnp.mean((model.apply(params, x) - 1.0) ** 2), params


def nnx_mlp():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Linear(12, 16, rngs=rngs), nnx.LayerNorm(16, rngs=rngs)
            self.last = nnx.Linear(16, 4, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.norm(self.first(x))))

    x = normal(1, 8, 12)
    graph, params = nnx.split(Model(nnx.Rngs(0)))
    return lambda params: jnp.mean((nnx.merge(graph, params)(x) - 1.0) ** 2), params


def equinox_mlp():
    x = normal(2, 8, 12)
    model = eqx.nn.MLP(12, 4, width_size=16, depth=1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)

    def value_fn(params):
        return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - 1.0) ** 2)

    return value_fn, params


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        query, key, value = jnp.split(nn.Dense(48)(nn.LayerNorm()(x))[..., None, :], 3, axis=-1)
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.Dense(16)(nn.dot_product_attention(query, key, value, mask=mask)[..., 0, :])
        return x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x)))), None


class Transformer(nn.Module):
    """Layers stacked and scanned, each rematerialised; the embedding is the head as well."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(24, 16)
        layers = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers()(embed(tokens), None)
        return embed.attend(nn.LayerNorm()(x))


def transformer():
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 24, (4, 9)))
    model = Transformer()
    params = model.init(jax.random.key(0), tokens)

    def value_fn(params):
        logits = jax.nn.log_softmax(model.apply(params, tokens[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))

    return value_fn, params


def cnn():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.max_pool(nn.relu(nn.Conv(8, (3, 3))(x)), (2, 2), strides=(2, 2))
            return nn.Dense(4)(x.mean(axis=(1, 2)))

    model, x = Model(), normal(4, 3, 8, 8, 2)
    params = model.init(jax.random.key(0), x)
    return lambda params: jnp.mean((model.apply(params, x) - 1.0) ** 2), params


MODELS = {
    "linen": linen_mlp,
    "nnx": nnx_mlp,
    "equinox": equinox_mlp,
    "transformer": transformer,
    "cnn": cnn,
}


@functools.cache
def model_of(name, quantizer):
    value_fn, params = MODELS[name]()
    return value_fn, zq.quantize(params, QUANTIZERS[quantizer])


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "quantizer", "boundary", "structure"),
    [
        ("nnx", "nf4", "reflect", "rank_one"),
        ("equinox", "nf4", "clamp", "dense"),
        ("cnn", "uniform", "reflect", "sparse"),
        slow("transformer", "nf4", "clamp", "rank_one"),  # 20 s
        slow("linen", "uniform", "clamp", "rank_one"),
        slow("linen", "mu_law", "clamp", "rank_one_uniform"),
        slow("linen", "nf4", "mask", "rank_one"),
        slow("linen", "mu_law", "reflect", "rank_one"),
        slow("nnx", "uniform", "mask", "sparse"),
        slow("nnx", "mu_law", "clamp", "dense"),
        slow("equinox", "uniform", "clamp", "rank_one"),
        slow("equinox", "mu_law", "mask", "rank_one"),
        slow("cnn", "nf4", "clamp", "rank_one"),
        slow("transformer", "uniform", "mask", "rank_one"),
        slow("transformer", "mu_law", "reflect", "sparse"),
        slow("transformer", "uniform", "clamp", "dense"),
    ],
)
def test_queries_of_any_model_are_those_of_the_displaced_codes(
    name, quantizer, boundary, structure
):
    value_fn, params = model_of(name, quantizer)
    assert len(quantized_leaves(params)) >= 2
    assert_at_edges(params)
    assert_implicit_is_materialised(value_fn, params, boundary=boundary, **STRUCTURES[structure])


@pytest.mark.parametrize("name", ["transformer", slow("cnn"), slow("nnx")])
def test_quaxified_models_compute_with_the_dequantized_values(name):
    value_fn, params = model_of(name, "nf4")
    expected = jax.jit(value_fn)(zq.dequantize(params))
    actual = jax.jit(zq.quaxify(value_fn))(params)
    np.testing.assert_allclose(actual, expected, rtol=RTOL)


def test_a_model_that_computes_in_bfloat16_is_queried_in_bfloat16():
    model, x = Mlp(dtype=jnp.bfloat16), normal(0, 8, 12)
    params = zq.quantize(linen_mlp()[1], QUANTIZERS["uniform"])

    def value_fn(params):
        return jnp.mean((model.apply(params, x) - jnp.bfloat16(1.0)) ** 2)

    @jax.jit
    def two_ways(params):
        probes = describe(params, **STRUCTURES["rank_one"])
        expected = [value_fn(displaced(params, probes, side)) for side in (1, -1)]
        return queries.losses(value_fn, params, probes), jnp.stack(expected)

    with (
        jax.numpy_dtype_promotion("standard"),  # for flax
        pytest.warns(UserWarning, match="a loss in bfloat16, which rounds away the difference"),
    ):
        implicit, expected = two_ways(params)
    assert implicit.dtype == jnp.float32 and expected.dtype == jnp.bfloat16
    # M, D and their products are rounded to 8 bits where the plain model rounds the sum once.
    np.testing.assert_allclose(implicit, expected.astype(jnp.float32), rtol=2.0**-5)


# The rank-one rule itself


def rank_one(array, boundary="clamp", side=1):
    """An array displaced along a rank-one direction, implicitly and in plain floats."""
    (probe,) = describe(array, boundary=boundary, **STRUCTURES["rank_one"])
    implicit = zq.PerturbedArray(array, probe.flipped(jnp.asarray(side, jnp.int8)))
    return implicit, displaced(array, [probe], side)


def products(w, x):
    """A (12, 20) weight on either side, contracted over either axis."""
    return {
        "x@w": x[:, :12] @ w,
        "x@w.T": x[:, :20] @ w.T,
        "w@x": w @ x[:20],
        "w.T@x": w.T @ x[:12],
        "vector@w": x[0, :12] @ w,
        "w@vector": w @ x[:20, 0],
        "batched": jnp.einsum("bsi,io->bso", x[:, :24].reshape(24, 2, 12), w),
        "batched, w first": jnp.einsum("io,bso->ibs", w, x.reshape(24, 2, 20)),
        "vmapped": jax.vmap(lambda row: row @ w)(x[:, :12]),
        "both contracted over their first": jax.lax.dot_general(
            w, x[:12], (((0,), (0,)), ((), ()))
        ),
        "both axes contracted": jnp.einsum("io,io->", w, x[:12, :20]),
        "none contracted": jnp.einsum("io,b->iob", w, x[:, 0]),
    }


@pytest.mark.parametrize(
    ("quantizer", "boundary"),
    [
        ("uniform", "clamp"),
        ("nf4", "mask"),
        slow("uniform", "reflect"),
        slow("nf4", "clamp"),
        slow("mu_law", "clamp"),
        slow("uniform", "mask"),
        slow("nf4", "reflect"),
        slow("mu_law", "mask"),
        slow("mu_law", "reflect"),
    ],
)
def test_products_with_a_rank_one_displacement_are_exact_up_to_rounding(quantizer, boundary):
    array = QUANTIZERS[quantizer](normal(6, 12, 20))
    x = normal(7, 24, 40)

    @jax.jit
    def two_ways(array, side):
        implicit, plain = rank_one(array, boundary, side)
        return zq.quaxify(products)(implicit, x), products(plain, x)

    for side in (1, -1):
        actual, expected = two_ways(array, jnp.int32(side))
        for name in expected:
            np.testing.assert_allclose(
                actual[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name
            )


def test_products_in_bfloat16_err_by_roundings_of_bfloat16():
    array = QUANTIZERS["uniform"](normal(6, 12, 20).astype(jnp.bfloat16))
    x = normal(7, 24, 12).astype(jnp.bfloat16)

    @jax.jit
    def two_ways(array):
        implicit, plain = rank_one(array)
        x32, plain32 = x.astype(jnp.float32), plain.astype(jnp.float32)
        return zq.quaxify(lambda w: x @ w)(implicit), x32 @ plain32, abs(x32) @ abs(plain32)

    actual, exact, size = two_ways(array)
    assert actual.dtype == jnp.bfloat16
    # Half an ulp, 2^-9, for each of M, D, the plain values, both products and their sum; M and D
    # may be twice as large as the values between them.
    assert (abs(actual.astype(jnp.float32) - exact) < 6 * 2.0**-9 * 2 * size).all()


def dots(jaxpr):
    """Every dot_general in a jaxpr, inside calls and loops too."""
    for equation in jaxpr.eqns:
        if equation.primitive is jax.lax.dot_general_p:
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from dots(inner)


def dot_shapes(losses, params):
    found = dots(jax.make_jaxpr(losses)(params).jaxpr)
    return sorted(tuple(v.aval.shape for v in equation.invars) for equation in found)


def tanh_network(x):
    return lambda params: jnp.sum(jnp.tanh(x @ params["a"]) @ params["b"])


def test_both_sides_of_a_rank_one_query_share_the_weights_of_a_uniform_grid():
    x = normal(8, 5, 6)
    params = zq.quantize({"a": normal(9, 6, 7), "b": normal(10, 7, 3)}, zq.Quantizer(8, range=9.0))

    def losses(params):
        probes = describe(params, **STRUCTURES["rank_one"])
        return queries.losses(tanh_network(x), params, probes)

    found = dot_shapes(losses, params)
    # x a once for both sides; then the sides are rows of one product, and no weight is doubled.
    assert found.count(((5, 6), (6, 7))) == 1
    assert found.count(((2, 5, 7), (7, 3))) == 1
    matrices = [w for _, w in found if w in ((6, 7), (7, 3))]
    assert len(matrices) == 2


def test_many_queries_share_two_weights_of_any_grid():
    x = normal(8, 5, 6)
    params = zq.quantize({"a": normal(9, 6, 7), "b": normal(10, 7, 3)}, QUANTIZERS["mu_law"])

    def losses(params):
        def query(i):
            probes = [
                directions.describe(jax.random.fold_in(jax.random.key(i), j), array, 1.0, **choices)
                for j, array in enumerate(quantized_leaves(params))
            ]
            return queries.losses(tanh_network(x), params, probes, together=4)

        choices = STRUCTURES["rank_one"]
        return jax.vmap(query)(jnp.arange(4))

    found = dot_shapes(losses, params)
    # x M once for all, x D for all as rows of one product; and the same for b.
    assert found == sorted(
        [
            ((5, 6), (6, 7)),
            ((4, 2, 5, 6), (6, 7)),
            ((4, 2, 5, 7), (7, 3)),
            ((4, 2, 5, 7), (7, 3)),
        ]
    )


@pytest.mark.parametrize("tokens", [2, 5])
def test_a_dense_query_is_one_product_a_side(tokens):
    x = normal(8, tokens, 6)
    params = zq.quantize({"a": normal(9, 6, 7)}, QUANTIZERS["mu_law"])

    def losses(params):
        probes = describe(params, **STRUCTURES["dense"])
        return queries.losses(lambda params: jnp.sum(x @ params["a"]), params, probes)

    found = dot_shapes(losses, params)
    if tokens == 2:  # one after the other: no two decoded matrices at a time
        assert found == [((2, 6), (6, 7))] * 2
    else:  # the matrices are small beside the vectors
        assert found == [((2, 6, 7), (2, 5, 6))] or found == [((2, 5, 6), (2, 6, 7))]


# Slices, rows and corners


@pytest.mark.parametrize(
    ("quantizer", "structure"),
    [
        ("mu_law", "rank_one_uniform"),
        ("nf4", "dense"),
        slow("uniform", "rank_one"),
        slow("nf4", "sparse"),
    ],
)
def test_a_scan_over_rows_sees_the_rows_of_the_displaced_matrix(quantizer, structure):
    def two_ways(array):
        (probe,) = describe(array, **STRUCTURES[structure])
        scan = lambda w: jax.lax.scan(lambda carry, row: (carry, 1.0 * row), 0.0, w)[1]  # noqa: E731
        rows = zq.quaxify(scan)(zq.PerturbedArray(array, probe))
        return rows, displaced(array, [probe], 1)

    rows, expected = jax.jit(two_ways)(QUANTIZERS[quantizer](normal(11, 6, 40)))
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize(
    ("shape", "structure"),
    [
        ((), "rank_one"),
        ((5,), "sparse"),
        ((3, 1), "rank_one"),
        ((2, 3, 4), "sparse"),
        slow((), "sparse"),
        slow((5,), "rank_one"),
        slow((3, 1), "sparse"),
        slow((2, 3, 4), "rank_one"),
    ],
)
def test_arrays_of_any_shape_are_displaced(shape, structure):
    def two_ways(array):
        (probe,) = describe(array, **STRUCTURES[structure])
        return zq.PerturbedArray(array, probe).materialise(), displaced(array, [probe], 1)

    actual, expected = jax.jit(two_ways)(zq.Quantizer(8, range=2.0)(normal(12, *shape)))
    assert actual.shape == shape
    np.testing.assert_array_equal(actual, expected)


def test_float_leaves_and_operations_without_a_rule_are_served():
    params = {"w": QUANTIZERS["nf4"](normal(13, 8, 8)), "b": normal(14, 8)}

    def value_fn(params):
        tree = jax.tree.map(jnp.sin, params)
        return jnp.sum(jnp.sort(tree["w"], axis=0)[2] * tree["b"]) + jnp.linalg.norm(params["w"])

    assert_implicit_is_materialised(value_fn, params, **STRUCTURES["rank_one"])


def test_an_objective_may_return_a_scalar_parameter_as_it_is():
    array = zq.Quantizer(8, range=1.0)(jnp.float32(0.5))
    (probe,) = describe(array, distribution="rademacher")
    actual = queries.losses(lambda w: w, array, [probe], center=True)
    expected = [displaced(array, [probe], side) for side in (1, -1, 0)]
    np.testing.assert_array_equal(actual, jnp.stack(expected))


# CAQ-ZO: queries stay on the codebook


CODEBOOKS = {
    "uniform8": zq.Quantizer(8, range=0.3),
    "uniform4": zq.Quantizer(4, range=(-0.5, 1.0)),
    "nf4": zq.Quantizer(4, companders.nf4(), range=0.7),
    "mu_law8": zq.Quantizer(8, companders.mu_law(), range=0.7),
    "mu_law4": zq.Quantizer(4, companders.mu_law(), range=0.7),
}
CAQ_QUERIES = [("clamp", "dense", 1.0), ("mask", "rank_one", 1.0), ("reflect", "sparse", 0.5)]


@pytest.mark.parametrize(("codebook", "query"), by_turns(CODEBOOKS, CAQ_QUERIES))
def test_rounding_a_caq_zo_query_to_the_codebook_changes_no_code(codebook, query):
    quantizer, (boundary, structure, density) = CODEBOOKS[codebook], query
    params = {"w": quantizer(0.3 * normal(15, 16, 32))}
    tx = zq.caq_zo(
        1.0, key=jax.random.key(4), boundary=boundary, structure=structure, density=density
    )

    @jax.jit
    def rounded(params):
        probes = tx.probes(tx.init(params), params)

        def at(side):
            point = queries.endpoints(params, probes, side)["w"]
            return point, quantizer(point.materialise())

        return jax.lax.map(at, jnp.array([1, -1], jnp.int8))

    start = params["w"].codes.astype(jnp.int32)
    both = rounded(params)
    for i in range(2):
        point, again = jax.tree.map(lambda leaf, i=i: leaf[i], both)
        np.testing.assert_array_equal(again.codes, point.codes)
        np.testing.assert_array_equal(again.materialise(), point.materialise())
        moved = point.codes.astype(jnp.int32) - start
        assert abs(moved).max() == 1 and (moved == 1).any() and (moved == -1).any()


def test_rounding_a_caq_zo_query_of_an_nf4_block_to_the_nearest_level_changes_no_code():
    params = {"w": zq.nf4(block=16)(normal(15, 16, 32))}
    tx = zq.caq_zo(1.0, key=jax.random.key(4), boundary="clamp")

    @jax.jit
    def points(params):
        probes = tx.probes(tx.init(params), params)
        return [queries.endpoints(params, probes, side)["w"] for side in (1, -1)]

    levels = np.asarray(params["w"].grid.levels, np.float32)
    for point in points(params):
        scale = np.repeat(point.scale, 16, axis=-1)
        normalised = np.asarray(point.materialise())[..., None] / scale[..., None]
        nearest = abs(normalised - levels).argmin(axis=-1)
        np.testing.assert_array_equal(nearest, point.codes.astype(jnp.int32))


def test_endpoints_are_the_displaced_codes():
    @jax.jit
    def two_ways(params):
        probes = describe(params, distribution="gaussian")
        return [
            (
                zq.dequantize(queries.endpoints(params, probes, side)),
                displaced(params, probes, side),
            )
            for side in (1, -1)
        ]

    for actual, expected in two_ways({"w": QUANTIZERS["mu_law"](normal(6, 12, 20)), "b": 2.0}):
        jax.tree.map(np.testing.assert_array_equal, actual, expected)

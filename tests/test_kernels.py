"""The kernels, interpreted on a CPU, give the products that plain floats give.

The counterpart is built by hand: displace the codes, decode them, and multiply in float32.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choosing import by_turns

import zoqo_jax as zq
from zoqo_jax import directions
from zoqo_jax.grids import companders
from zoqo_jax.implicit import kernels

# Of the largest entry. Both sum the same products in float32, in different orders; a bfloat16
# result is rounded once from such a sum.
RTOL = {jnp.float32: 1e-5, jnp.bfloat16: 2.0**-8}

BOUNDARIES = ["clamp", "mask", "reflect"]
TOKENS, ROWS = 3, 20  # neither divisible by a tile
SHORT = kernels.Tiles(16, 16, 16)

UNIFORM = {bits: zq.Quantizer(bits).grid for bits in (2, 4, 8)}
NF4 = zq.Quantizer(4, companders.nf4(), block=64).grid

# Grid, columns, shape of the scale, block, whether there is an offset, tiles. Rows of 20, 24, 192
# and 20 bytes in tiles of 16, 16, 128 and 16: none is divisible, and blocks are shorter than tiles
# and longer.
ARRAYS = {
    "uniform8": (UNIFORM[8], 20, (1, 20), None, False, SHORT),
    "uniform4": (UNIFORM[4], 48, (ROWS, 6), (-1, 8), True, SHORT),
    "nf4": (NF4, 384, (ROWS, 6), (-1, 64), False, kernels.Tiles(16, 16, 128)),
    "uniform2": (UNIFORM[2], 80, (1, 1), None, False, SHORT),
    "long_blocks": (NF4, 128, (ROWS, 2), (-1, 64), False, SHORT),
    "row_blocks": (UNIFORM[4], 40, (2, 1), (-2, 16), True, SHORT),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def make(name, dtype=jnp.float32):
    """An array of random codes, many at the edges, signs, and reaches of a sixth of the grid."""
    grid, columns, shape, block, has_offset, tiles = ARRAYS[name]
    rng = np.random.default_rng(17)
    codes = rng.integers(grid.low, grid.high, (ROWS, columns), endpoint=True)
    edges = rng.integers(0, 4, codes.shape)
    codes = np.where(edges == 0, grid.low, np.where(edges == 1, grid.high, codes))
    scale = jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)
    offset = jnp.asarray(rng.normal(size=shape), jnp.float32) if has_offset else None
    array = zq.QuantizedArray.from_codes(jnp.asarray(codes), scale, offset, grid, block, dtype)
    a, b = (jnp.asarray(rng.choice([-1, 1], n), jnp.int8) for n in codes.shape)
    m = rng.integers(1, max(grid.high // 6, 1), shape, endpoint=True)
    return array, a, b, jnp.asarray(m, jnp.int16), tiles


@functools.partial(jax.jit, static_argnames=("boundary", "transposed"))
def expected(x, array, a, b, m, boundary, transposed=False):
    """The products with the values at `n +- m a b^T`, the boundary's arithmetic included."""
    out = []
    for x_side, side in zip(x, (1, -1), strict=False):
        u = side * array.broadcast_scales(m) * (a[:, None] * b).astype(jnp.int16)
        values = array.decode(directions.displace(array.codes, u, array.grid, boundary))
        out.append(multiply(x_side, values.T if transposed else values))
    return jnp.stack(out)


def multiply(x, values):
    return jnp.matmul(x.astype(jnp.float32), values.astype(jnp.float32))


def assert_close(out, expected, dtype):
    assert out.dtype == dtype and out.shape == expected.shape
    size = float(np.abs(expected).max())
    np.testing.assert_allclose(
        np.asarray(out, np.float32), expected, rtol=0.0, atol=RTOL[dtype] * size
    )


def check_rank_one(name, boundary, dtype=jnp.float32, transposed=False):
    array, a, b, m, tiles = make(name, dtype)
    x = normal(1, 2, TOKENS, array.shape[1 if transposed else 0]).astype(dtype)
    product = functools.partial(
        kernels.rank_one_product,
        boundary=boundary,
        transposed=transposed,
        tiles=tiles,
        interpret=True,
    )
    out = jax.jit(product)(x, array, a, b, m)
    assert_close(out, expected(x, array, a, b, m, boundary, transposed), dtype)


@pytest.mark.parametrize(
    ("name", "boundary"), by_turns(["uniform8", "uniform4", "nf4", "uniform2"], BOUNDARIES)
)
def test_both_sides_at_every_edge(name, boundary):
    check_rank_one(name, boundary)


def test_bfloat16():
    check_rank_one("long_blocks", "clamp", jnp.bfloat16)


def test_transposed():
    check_rank_one("uniform4", "mask", transposed=True)


def test_blocks_of_rows():
    check_rank_one("row_blocks", "clamp")


@pytest.mark.parametrize(("name", "transposed"), [("nf4", False), ("row_blocks", True)])
def test_plain_product(name, transposed):
    array, *_ = make(name)
    x = normal(2, TOKENS, array.shape[1 if transposed else 0])
    out = kernels.decoded_product(x, array, transposed=transposed, interpret=True)
    values = array.materialise()
    assert_close(out, multiply(x, values.T if transposed else values), jnp.float32)


def test_one_side_and_one_reach():
    array, a, b, *_ = make("uniform8")
    x, m = normal(3, 1, TOKENS, ROWS), jnp.full((1, 1), 40, jnp.int16)
    out = kernels.rank_one_product(x, array, a, b, 40, "reflect", interpret=True)
    assert_close(out, expected(x, array, a, b, m, "reflect"), jnp.float32)


def test_no_tokens():
    array, a, b, m, _ = make("uniform8")
    out = kernels.rank_one_product(jnp.zeros((2, 0, ROWS)), array, a, b, m, "clamp")
    assert out.shape == (2, 0, 20)


def test_lowers_for_a_gpu():
    array, a, b, m, _ = make("uniform4", jnp.bfloat16)
    product = jax.jit(functools.partial(kernels.rank_one_product, boundary="mask"))
    traced = product.trace(jnp.zeros((2, TOKENS, ROWS), jnp.bfloat16), array, a, b, m)
    assert "xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_what_is_supported():
    def quantized(quantizer, *shape):
        return jax.eval_shape(quantizer, jax.ShapeDtypeStruct(shape, jnp.float32))

    assert all(kernels.supports(make(name)[0]) for name in ARRAYS)
    mu_law = companders.mu_law()
    assert not kernels.supports(quantized(zq.Quantizer(8, mu_law), 4, 4))  # 256 levels in a table
    assert kernels.supports(quantized(zq.Quantizer(4, mu_law), 4, 4))
    assert not kernels.supports(quantized(zq.Quantizer(8), 4))
    assert not kernels.supports(quantized(zq.Quantizer(8), 2, 4, 4))
    assert not kernels.supports(quantized(zq.Quantizer(8), 0, 4))
    assert not kernels.supports(quantized(zq.Quantizer(8, block=24), 4, 48))
    assert kernels.supports(quantized(zq.Quantizer(8, block=48), 4, 96))
    assert kernels.supports(quantized(zq.Quantizer(4, block=24), 4, 24))  # one block
    assert not kernels.supports(quantized(zq.Quantizer(4, block=32), 4, 96))  # 48 bytes a row


BAD = {
    "x must have the array's dtype float32, got bfloat16": {
        "x": jnp.ones((2, TOKENS, ROWS), jnp.bfloat16)
    },
    r"x must have a last axis 20 long, got shape \(2, 3, 7\)": {"x": jnp.ones((2, TOKENS, 7))},
    r"x must have 3 axes, .*, got shape \(3, 3, 20\)": {"x": jnp.ones((3, TOKENS, ROWS))},
    r"a must have shape \(20,\), got \(2,\)": {"a": jnp.ones(2, jnp.int8)},
    r"b must have shape \(20,\), got \(3,\)": {"b": jnp.ones(3, jnp.int8)},
    r"m must .* shape \(1, 20\), got \(2, 20\)": {"m": jnp.ones((2, 20), jnp.int16)},
    "boundary must be one of .*, got 'wrap'": {"boundary": "wrap"},
    "tiles.rows must be a power of two, 16 or more, got 24": {"tiles": kernels.Tiles(16, 24, 16)},
    "array must be .*256 nonuniform levels.*: its 256 levels are more than 16": {
        "array": zq.Quantizer(8, companders.mu_law())(jnp.ones((ROWS, 20)))
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    array, a, b, m, tiles = make("uniform8")
    given = {"x": jnp.ones((2, TOKENS, ROWS)), "array": array, "a": a, "b": b, "m": m}
    given |= {"boundary": "clamp", "tiles": tiles} | BAD[message]
    product = inspect.unwrap(kernels.rank_one_product)  # without the tests' own type checks
    with pytest.raises(ValueError, match=message):
        product(**given)

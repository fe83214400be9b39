"""Codes of every width, scales of two levels and groups of columns are what plain arrays would be.

The counterpart of each array here has a code to a byte and a float32 scale for every block.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import serialization

import zoqo_jax as zq
from zoqo_jax import directions
from zoqo_jax.grids import packing
from zoqo_jax.grids.scales import TwoLevel

ROWS, COLUMNS, BLOCK = 6, 64, 16


def uniform(bits, zero=0):
    return zq.Grid(tuple(float(n - zero) for n in range(2**bits)), 0, 2**bits - 1)


def k_quant(bits, *, lead=(), seed=0, with_offset=True):
    """Codes under scales of two levels, some of them negative."""
    rng = np.random.default_rng(seed)
    shape, blocks = (*lead, ROWS, COLUMNS), COLUMNS // BLOCK
    codes = jnp.asarray(rng.integers(0, 2**bits, shape), jnp.uint8)

    def two_level(low):
        outer = jnp.asarray(rng.normal(size=(*lead, ROWS, 2)), jnp.float16)
        inner = rng.integers(low, 32, (*lead, ROWS, blocks)).astype(np.int8)
        return TwoLevel(outer, jnp.asarray(inner))

    offset = two_level(0) if with_offset else None
    return zq.QuantizedArray.from_codes(
        codes, two_level(-32), offset, uniform(bits), (-1, BLOCK), bits=bits
    )


def in_groups(bits, *, lead=(), seed=0):
    """Codes of which columns far apart share scales."""
    rng = np.random.default_rng(seed)
    codes = jnp.asarray(rng.integers(0, 2**bits, (*lead, ROWS, COLUMNS)), jnp.uint8)
    scale = jnp.asarray(rng.normal(size=(*lead, ROWS, 4)), jnp.float16)
    zeros = jnp.asarray(rng.integers(0, 2**bits, scale.shape), jnp.uint8)
    groups = rng.permuted(np.resize(np.arange(4), (*lead, 1, COLUMNS)), axis=-1)
    return zq.QuantizedArray.from_codes(
        codes, scale, TwoLevel(-scale, zeros), uniform(bits), bits=bits,
        block_of=jnp.asarray(groups, jnp.int32),
    )  # fmt: skip


def plain(array):
    """The same codes in bytes, with a float32 scale for each of them."""
    scale, offset = (
        None if x is None else jnp.broadcast_to(array.broadcast_scales(x), array.shape)
        for x in (array.scale, array.offset)
    )
    return zq.QuantizedArray(array.codes, scale, offset, array.grid, None, array.value_dtype)


ARRAYS = {
    **{f"{bits} bits": k_quant(bits, with_offset=bits % 2 == 0) for bits in packing.WIDTHS},
    **{f"{bits} bits in groups": in_groups(bits) for bits in (3, 4, 8)},
}


@pytest.mark.parametrize("bits", packing.WIDTHS)
@pytest.mark.parametrize("shape", [(1, 8), (3, 40), (2, 3, 16)])
def test_codes_take_their_bits_and_come_back(bits, shape):
    *lead, columns = shape
    codes = np.random.default_rng(bits).integers(0, 2**bits, shape).astype(np.uint8)
    packed = packing.pack(jnp.asarray(codes), bits)
    assert packed.shape == (*lead, bits * columns // 8)
    np.testing.assert_array_equal(packing.unpack(packed, bits), codes)
    parts = [packing.part(packed, bits, i) for i in range(packing.parts(bits))]
    np.testing.assert_array_equal(np.concatenate(parts, axis=-1), codes)
    np.testing.assert_array_equal(packing.pack_parts(parts, bits), packed)
    places = np.random.default_rng(0).integers(0, shape[-1], 7)
    np.testing.assert_array_equal(
        packing.take(packed, bits, jnp.asarray(places)), codes[..., places]
    )


@pytest.mark.parametrize("columns", range(1, 17))
def test_what_does_not_divide_is_kept_wider(columns):
    array = zq.QuantizedArray.from_codes(
        jnp.ones((2, columns), jnp.uint8), jnp.ones((1, 1)), None, uniform(3), bits=3
    )
    assert array.shape == (2, columns) and (array.codes == 1).all()
    assert array.bits == (3 if columns % 8 == 0 else 4 if columns % 2 == 0 else 8)


@pytest.mark.parametrize("bits", [1, 4, 9])
def test_a_width_must_hold_the_grid(bits):
    with pytest.raises(ValueError, match=rf"bits must be in \[2, 8\] and hold .*, got {bits}"):
        zq.QuantizedArray.from_codes(
            jnp.ones((2, 8), jnp.uint8), jnp.ones((1, 1)), None, uniform(5), bits=bits
        )


def test_scales_are_products_or_quotients_in_float32():
    outer = jnp.asarray([[0.1, 3.0]], jnp.float32)
    inner = jnp.asarray([[1.0, 2.0, 0.5, 8.0]], jnp.float8_e4m3fn)
    each = np.float32([0.1, 0.1, 3.0, 3.0])
    theirs = np.float32([1.0, 2.0, 0.5, 8.0])
    np.testing.assert_array_equal(TwoLevel(outer, inner).values()[0], each * theirs)
    np.testing.assert_array_equal(TwoLevel(outer, inner, divides=True).values()[0], theirs / each)


@pytest.mark.parametrize(
    ("bits", "blocks", "kept"), [(2, 8, 2), (4, 8, 4), (4, 7, 8), (2, 6, 8), (3, 8, 8), (6, 8, 8)]
)
def test_inner_numbers_share_bytes_where_they_fill_them(bits, blocks, kept):
    rng = np.random.default_rng(0)
    inner = rng.integers(0, 2**bits, (3, blocks)).astype(np.uint8)
    outer = rng.normal(size=(3, 1)).astype(np.float16)
    two = TwoLevel.packed(outer, inner, bits)
    assert (two.bits, two.inner.nbytes) == (kept, 3 * blocks * kept // 8)
    assert (two.shape, two.ndim, two.size) == ((3, blocks), 2, 3 * blocks)
    np.testing.assert_array_equal(two.numbers(), inner)
    np.testing.assert_array_equal(
        two.values(), TwoLevel(*map(jnp.asarray, (outer, inner))).values()
    )
    inner[1, 1] = 2**bits  # a GPTQ zero point may be that
    assert TwoLevel.packed(outer, inner, bits).bits == 8


def test_powers_of_two_are_exact_and_stay_when_zeros_are_added():
    """All 255 bytes that are no NaN: an update adds zeros to what is frozen."""
    exponents = np.arange(255, dtype=np.uint8).reshape(-1, 3)
    scale = TwoLevel(jnp.ones((1, 1)), jnp.asarray(exponents), powers=True)
    expected = exponents.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    values = np.array(jax.jit(lambda scale: scale.values())(scale))
    assert values[0, 0] in (0.0, 2.0**-127)  # below float32's normal numbers, XLA may round to zero
    values[0, 0] = expected[0, 0]
    np.testing.assert_array_equal(values, expected)
    grid = zq.Grid((-1.0, 0.0, 1.0), 0, 2)
    codes = jnp.ones((len(exponents), 6), jnp.uint8)
    params = {"w": zq.QuantizedArray.from_codes(codes, scale, None, grid, (-1, 2), bits=2)}
    tx = zq.zoqo(key=jax.random.key(0))
    loss = lambda params: jnp.abs(params["w"]).sum()  # noqa: E731
    updates, _ = jax.jit(lambda p: tx.update(None, tx.init(p), p, value_fn=loss))(params)
    for apply in (zq.apply_updates, optax.apply_updates):
        np.testing.assert_array_equal(apply(params, updates)["w"].scale.inner, exponents)


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_values_rows_columns_and_parts_are_those_of_the_plain_array(array):
    expected = plain(array)
    values = expected.materialise()
    assert array.packed.nbytes == ROWS * COLUMNS * array.bits // 8
    np.testing.assert_array_equal(jax.jit(lambda a: a.materialise())(array), values)
    parts = [part.materialise() for part in array.parts]
    np.testing.assert_array_equal(np.concatenate(parts, axis=-1), values)
    i = jnp.int32(array.per_byte - 1)
    np.testing.assert_array_equal(
        jax.jit(lambda a, i: a.part(i).materialise())(array, i), parts[-1]
    )
    places = jnp.array([5, 63, 0, 32])
    np.testing.assert_array_equal(array.take_columns(places).materialise(), values[:, places])
    for fn in (lambda x: x[2], lambda x: x[::-1], lambda x: x.reshape(2, 3, -1), lambda x: x[1:3]):
        np.testing.assert_array_equal(array.take_rows(fn).materialise(), fn(values))
    np.testing.assert_array_equal(array.step, np.abs(array.scale.astype(jnp.float32)))
    again = array.with_codes(array.codes)
    np.testing.assert_array_equal(again.packed, array.packed)


@pytest.mark.parametrize("name", ["3 bits", "4 bits", "5 bits", "6 bits", "4 bits in groups"])
@pytest.mark.parametrize("structure", ["dense", "rank_one", "sparse", "paired", "columns"])
def test_products_are_those_of_the_displaced_codes(name, structure):
    """Whichever way the matrix is multiplied, and whichever algorithm does it."""
    array = ARRAYS[name]
    direction = directions.describe(
        jax.random.key(3), array, 2.0, structure=structure, distribution="rademacher"
    )
    perturbed = zq.PerturbedArray(array, direction)
    u = direction.draw(array).astype(jnp.int32)
    moved = jnp.clip(array.codes.astype(jnp.int32) + u, 0, array.grid.high)
    np.testing.assert_array_equal(perturbed.endpoint().codes, moved)
    values = np.asarray(plain(array).with_codes(moved).materialise())
    x, y = (np.random.default_rng(1).normal(size=(3, n)).astype(np.float32) for n in array.shape)
    across = jax.jit(zq.quaxify(lambda w: (x @ w, y @ w.T, w[jnp.array([4, 1])])))(perturbed)
    for ours, theirs in zip(across, (x @ values, y @ values.T, values[[4, 1]]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5 * np.abs(values).max())


@pytest.mark.parametrize("make", [lambda **at: k_quant(5, **at), lambda **at: in_groups(3, **at)])
@pytest.mark.parametrize("method", [zq.zoqo, zq.caq_zo, zq.qzo])
def test_a_scanned_stack_trains(make, method):
    """Each layer sees what it would alone; codes stay legal, and `Info` counts those that moved."""
    stack = {"w": make(lead=(3,))}
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, COLUMNS)), jnp.float32)

    def loss(params):
        def layer(x, w):
            return jnp.tanh(jnp.pad(x @ w.T / 300.0, ((0, 0), (0, COLUMNS - ROWS)))), None

        return jax.lax.scan(layer, x, params["w"])[0].sum()

    one_by_one = x
    for w in stack["w"].materialise():
        one_by_one = jnp.tanh(jnp.pad(one_by_one @ w.T / 300.0, ((0, 0), (0, COLUMNS - ROWS))))
    np.testing.assert_allclose(zq.quaxify(loss)(stack), one_by_one.sum(), rtol=2e-5)

    tx = method(key=jax.random.key(0), num_queries=2)
    state = tx.init(stack)
    step = jax.jit(lambda params, state: tx.update(None, state, params, value_fn=loss))
    params, moved = stack, []
    for _ in range(6):
        updates, state = step(params, state)
        before, params = params, zq.apply_updates(params, updates)
        moved.append(int((params["w"].codes != before["w"].codes).sum()))
        assert method is zq.qzo or float(state.info.codes_moved) == moved[-1]
    if method is zq.qzo:
        np.testing.assert_array_equal(params["w"].packed, stack["w"].packed)
        return
    assert sum(moved) > 0
    at_edges = np.isin(params["w"].codes, (0, params["w"].grid.high)).mean()
    np.testing.assert_allclose(state.info.share_at_edges, at_edges, rtol=1e-6)
    for name in ("scale", "offset", "block_of"):
        for kept, now in zip(
            *(jax.tree.leaves(getattr(p["w"], name)) for p in (stack, params)), strict=True
        ):
            np.testing.assert_array_equal(kept, now)


@pytest.mark.parametrize("name", ["5 bits", "4 bits in groups"])
def test_trees_take_it_apart_and_put_it_together(name):
    array = ARRAYS[name]
    state = serialization.to_state_dict({"w": array})
    blank = jax.tree.map(jnp.zeros_like, array)
    again = serialization.from_state_dict({"w": blank}, state)["w"]
    for ours, theirs in zip(jax.tree.leaves(array), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    frozen = {"w": zq.freeze(array), "b": jnp.ones(2)}
    tx = optax.adamw(1e-1)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, frozen), tx.init(frozen), frozen)
        after = zq.apply_updates(frozen, updates)
    for ours, theirs in zip(jax.tree.leaves(array), jax.tree.leaves(after["w"]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (after["b"] != 1.0).all()


def bits_of(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("frozen", [False, True])
def test_minus_zero_stays_what_it_is(frozen):
    """Blocks of zeros have a scale or minimum of -0.0 in files, and so may any weight."""
    minus = jnp.full((2, 2), -0.0, jnp.float16)
    two = TwoLevel(minus, jnp.ones((2, 4), jnp.int8))
    codes = jnp.ones((2, 64), jnp.uint8)
    array = zq.QuantizedArray.from_codes(codes, two, two, uniform(4), (-1, 16), bits=4)
    trained = zq.Quantizer(4, range=1.0)(jnp.ones((2, 2)))
    params = {"w": zq.freeze(array) if frozen else array, "t": trained, "b": minus}
    tx = zq.zoqo(key=jax.random.key(0))
    loss = lambda params: params["t"].sum() + params["w"].sum()  # noqa: E731
    updates, _ = jax.jit(lambda p: tx.update(None, tx.init(p), p, value_fn=loss))(params)
    for apply in (zq.apply_updates, optax.apply_updates, jax.jit(optax.apply_updates)):
        after = apply(params, updates)
        assert bits_of((after["w"].scale, after["w"].offset, after["b"])) == bits_of(
            (two, two, minus)
        )


def test_offsets_may_have_more_groups_than_scales():
    """A group's number is kept whole, however the groups are shared."""
    columns = 2**8 + 8
    offset = jnp.arange(columns, dtype=jnp.float32)[None]
    groups = jnp.arange(columns, dtype=jnp.int32)[None, ::-1]
    array = zq.QuantizedArray.from_codes(
        jnp.zeros((1, columns), jnp.uint8), jnp.ones((1, 1)), offset, uniform(4), block_of=groups
    )
    np.testing.assert_array_equal(array.materialise(), offset[:, ::-1])
